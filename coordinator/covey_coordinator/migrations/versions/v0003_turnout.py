"""What became of devices in their last rounds, and when they came and went."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From the tables of 0002."""
    op.add_column("rounds", sa.Column("turnout", sa.Text))
    op.create_index("rounds_with_number", "rounds", ["round"])
    op.create_table(
        "fates",
        sa.Column("device", sa.Text, primary_key=True, nullable=False),
        sa.Column("round", sa.Integer, primary_key=True, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("phase", sa.Text, nullable=False),
        sa.Column("words", sa.Text, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sightings",
        sa.Column("device", sa.Text, primary_key=True, nullable=False),
        sa.Column("online", sa.Integer, nullable=False),
        sa.Column("since_unix", sa.Float, nullable=False),
    )
