"""times beyond 25 days, and a place for a write that is only tried"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":  # SQLite's integers have 64 bits in any case
        op.alter_column("turns", "first_chunk_ms", type_=sa.BigInteger)
    op.add_column("contextd_database", sa.Column("probe", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("contextd_database", "probe")
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("turns", "first_chunk_ms", type_=sa.Integer)
