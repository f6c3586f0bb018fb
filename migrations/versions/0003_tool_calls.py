"""calls of tools"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "tool_calls",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("context_key", KEY, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("turn_id", sa.String(64), nullable=False),
        sa.Column("message_key", KEY, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("call_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("arguments", sa.Text, nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("requires_approval", sa.Boolean, nullable=False),
        sa.Column("external", sa.Boolean, nullable=False),
        sa.Column("collected", sa.Boolean, nullable=False),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("result_message_key", KEY, nullable=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("decided_at", sa.BigInteger, nullable=True),
        sa.Column("started_at", sa.BigInteger, nullable=True),
        sa.Column("ended_at", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_tool_calls")),
        sa.UniqueConstraint("context_key", "id", name=op.f("uq_tool_calls_context_key_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        op.f("ix_tool_calls_context_key_turn_id"), "tool_calls", ["context_key", "turn_id"]
    )
    op.add_column("turns", sa.Column("left_out", sa.Text, nullable=True))
    op.add_column("contexts", sa.Column("usage", sa.Text, nullable=True))
    op.create_index(op.f("ix_tool_calls_message_key"), "tool_calls", ["message_key"])


def downgrade() -> None:
    op.drop_column("contexts", "usage")
    op.drop_column("turns", "left_out")
    op.drop_table("tool_calls")
