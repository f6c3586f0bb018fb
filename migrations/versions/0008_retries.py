"""what a retry goes on after"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "turns", sa.Column("from_start", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("turns", sa.Column("kept_to", sa.BigInteger, nullable=True))
    # Retries began anew until now, and what was tried again stayed hidden.
    op.execute(
        "UPDATE turns SET kept_to = 0 WHERE EXISTS (SELECT 1 FROM turns AS again"
        " WHERE again.context_key = turns.context_key AND again.retry_of = turns.id)"
    )


def downgrade() -> None:
    op.drop_column("turns", "kept_to")
    op.drop_column("turns", "from_start")
