"""The counter, the runs, their rounds, and the open round."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From nothing."""
    op.create_table(
        "counter",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1", name="counter_one"), primary_key=True),
        sa.Column("last_round", sa.Integer, nullable=False),
    )  # fmt: skip
    op.create_table(
        "uploads",
        sa.Column("model", sa.LargeBinary, primary_key=True, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("used", sa.Integer, nullable=False, unique=True),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("created_unix", sa.Float, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("rounds_done", sa.Integer, nullable=False),
        sa.Column("rounds_completed", sa.Integer, nullable=False),
        sa.Column("rounds_abandoned", sa.Integer, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("model_index", sa.Integer, nullable=False),
        sa.Column("last", sa.Text),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("transcripts_lost", sa.Integer, nullable=False),
        sa.Column("transcript_problem", sa.Text, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.name"), nullable=False),
        sa.Column("index", sa.Integer, nullable=False),
        sa.Column("round", sa.Integer),
        sa.Column("line", sa.Text, nullable=False),
    )
    op.create_index("rounds_of_run", "rounds", ["run", "index"])
    op.create_table(
        "open_round",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1", name="open_round_one"), primary_key=True),
        sa.Column("run", sa.Text, sa.ForeignKey("runs.name"), nullable=False),
        sa.Column("index", sa.Integer, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("spec", sa.LargeBinary, nullable=False),
        sa.Column("reveal_secret", sa.LargeBinary, nullable=False),
        sa.Column("opened_unix", sa.Float, nullable=False),
    )  # fmt: skip
    op.create_table(
        "journal",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("entry", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "chunks",
        sa.Column("device", sa.Text, primary_key=True, nullable=False),
        sa.Column("bitmap", sa.LargeBinary, nullable=False),
    )
