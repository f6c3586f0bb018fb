"""leases of processes instead of turns, and indexes for what is looked for all the time"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("lease_expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
    )
    op.drop_index("ix_turns_running", table_name="turns")
    op.drop_column("turns", "lease_expires_at")
    _partial_index("ix_turns_running", "turns", "owner_id", "status = 'running'")
    _partial_index("ix_turns_queued", "turns", "context_key", "status = 'queued'")
    waiting = "state IN ('awaiting_tool_approval', 'awaiting_tool_results')"
    _partial_index("ix_contexts_waiting", "contexts", "state_since", waiting)
    op.create_index(
        op.f("ix_contexts_state_changed_at_key"), "contexts", ["state", "changed_at", "key"]
    )


def downgrade() -> None:
    op.drop_index(op.f("ix_contexts_state_changed_at_key"), table_name="contexts")
    op.drop_index("ix_contexts_waiting", table_name="contexts")
    op.drop_index("ix_turns_queued", table_name="turns")
    op.drop_index("ix_turns_running", table_name="turns")
    op.add_column("turns", sa.Column("lease_expires_at", sa.BigInteger, nullable=True))
    # Of nobody who is known: these turns are taken over at once.
    op.execute("UPDATE turns SET lease_expires_at = 0 WHERE owner_id IS NOT NULL")
    _partial_index("ix_turns_running", "turns", "lease_expires_at", "status = 'running'")
    op.drop_table("nodes")


def _partial_index(name: str, table: str, column: str, where: str) -> None:
    condition = sa.text(where)
    op.create_index(name, table, [column], sqlite_where=condition, postgresql_where=condition)
