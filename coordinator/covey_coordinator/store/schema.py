"""The database's tables as they are now. How older ones become these: `covey_coordinator.migrations`.

A new database is made from here in one go; a test holds the two ways to the same schema.
"""

from sqlalchemy import (
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

REVISIONS = ("0001", "0002", "0003")
"""All there ever were, oldest first. Alembic's scripts say the same; it is imported to migrate only."""

HEAD = REVISIONS[-1]

metadata = MetaData()

version = Table(
    "alembic_version",
    metadata,
    Column("version_num", String(32), primary_key=True, nullable=False),
)

counter = Table(
    "counter",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="counter_one"), primary_key=True),
    Column("last_round", Integer, nullable=False),
)

# Revisions of models that devices may have contributed to. used: which was used before which.
uploads = Table(
    "uploads",
    metadata,
    Column("model", LargeBinary, primary_key=True, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("used", Integer, nullable=False, unique=True),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_unix", Float, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("rounds_done", Integer, nullable=False),
    Column("rounds_completed", Integer, nullable=False),
    Column("rounds_abandoned", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_index", Integer, nullable=False),
    Column("last", Text),
    Column("message", Text, nullable=False),
    Column("transcripts_lost", Integer, nullable=False),
    Column("transcript_problem", Text, nullable=False),
    Column("wish", Text, nullable=False, server_default=""),
)

# The history: a line of metrics each, as metrics.jsonl has it. index: within the run, from 1.
rounds = Table(
    "rounds",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run", Text, ForeignKey("runs.name"), nullable=False),
    Column("index", Integer, nullable=False),
    Column("round", Integer),
    Column("line", Text, nullable=False),
    Column("rolled_back_unix", Float),
    Column("turnout", Text),
    Index("rounds_of_run", "run", "index"),
    Index("rounds_with_number", "round"),
)

# What became of each device in its last rounds: see `turnout.Fate`. round: as in `rounds`.
fates = Table(
    "fates",
    metadata,
    Column("device", Text, primary_key=True, nullable=False),
    Column("round", Integer, primary_key=True, nullable=False),
    Column("what", Text, nullable=False),
    Column("phase", Text, nullable=False),
    Column("words", Text, nullable=False),
    sqlite_with_rowid=False,
)

# Which devices were online when they were last heard of, and since when.
sightings = Table(
    "sightings",
    metadata,
    Column("device", Text, primary_key=True, nullable=False),
    Column("online", Integer, nullable=False),
    Column("since_unix", Float, nullable=False),
)

open_round = Table(
    "open_round",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="open_round_one"), primary_key=True),
    Column("run", Text, ForeignKey("runs.name"), nullable=False),
    Column("index", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("reveal_secret", LargeBinary, nullable=False),
    Column("opened_unix", Float, nullable=False),
)

journal = Table(
    "journal",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("entry", LargeBinary, nullable=False),
)

chunks = Table(
    "chunks",
    metadata,
    Column("device", Text, primary_key=True, nullable=False),
    Column("bitmap", LargeBinary, nullable=False),
)

OF_THE_OPEN_ROUND = ("open_round", "journal", "chunks")
"""Emptied at its end."""
