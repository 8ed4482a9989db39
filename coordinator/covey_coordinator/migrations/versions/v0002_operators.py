"""What operators wish of a run that is being played, and which rounds were taken back."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From the tables of 0001."""
    op.add_column("runs", sa.Column("wish", sa.Text, nullable=False, server_default=""))
    op.add_column("rounds", sa.Column("rolled_back_unix", sa.Float))
