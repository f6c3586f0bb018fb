"""epochs of producers may be times in milliseconds: 64 bits"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    _alter(sa.Integer(), sa.BigInteger())


def downgrade() -> None:
    _alter(sa.BigInteger(), sa.Integer())


def _alter(before: sa.types.TypeEngine[int], after: sa.types.TypeEngine[int]) -> None:
    # An INTEGER of SQLite has 64 bits as it is.
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column(
            "heads", "fence", existing_type=before, type_=after, existing_nullable=False
        )
