"""what a turn's last answer ended for, and what servers attach to calls"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("turns", sa.Column("finish_reason", sa.Text, nullable=True))
    op.add_column("tool_calls", sa.Column("attached", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("tool_calls", "attached")
    op.drop_column("turns", "finish_reason")
