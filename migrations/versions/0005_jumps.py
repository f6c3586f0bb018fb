"""paths of many forks: each segment has a jump to one further up"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import context, op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
PAGE_ROWS = 1000

NUMBER = """
UPDATE segments SET number = made.number
FROM (
  SELECT key, row_number() OVER (PARTITION BY context_key ORDER BY key) AS number FROM segments
) AS made
WHERE made.key = segments.key
"""
READ = """
SELECT key, context_key, parent_key, number FROM segments
WHERE (context_key, number) > (:context_key, :number)
ORDER BY context_key, number LIMIT :limit
"""
WRITE = "UPDATE segments SET rank = :rank, jump_key = :jump_key WHERE key = :key"


def upgrade() -> None:
    op.add_column("segments", sa.Column("jump_key", KEY, nullable=True))
    op.add_column("segments", sa.Column("rank", sa.Integer, server_default="0", nullable=False))
    op.add_column("segments", sa.Column("number", sa.Integer, server_default="0", nullable=False))
    op.execute(NUMBER)
    op.drop_index(op.f("ix_segments_context_key"), "segments")
    op.create_index(op.f("ix_segments_context_key_number"), "segments", ["context_key", "number"])
    create_partial_index(
        "ix_segments_forks", "segments", ["parent_key", "parent_depth"], "parent_key IS NOT NULL"
    )
    op.create_index(
        op.f("ix_branches_context_key_segment_key"), "branches", ["context_key", "segment_key"]
    )
    op.create_index(op.f("ix_branches_segment_key"), "branches", ["segment_key"])
    create_partial_index(
        "ix_messages_queued", "messages", ["context_key"], "queued_branch IS NOT NULL"
    )
    # Printed as SQL there is nothing to read: old paths are then walked without jumps.
    if not context.is_offline_mode():
        add_jumps(op.get_bind())


def downgrade() -> None:
    op.drop_index("ix_messages_queued", "messages")
    op.drop_index(op.f("ix_branches_segment_key"), "branches")
    op.drop_index(op.f("ix_branches_context_key_segment_key"), "branches")
    op.drop_index("ix_segments_forks", "segments")
    op.drop_index(op.f("ix_segments_context_key_number"), "segments")
    op.create_index(op.f("ix_segments_context_key"), "segments", ["context_key"])
    for name in ("number", "rank", "jump_key"):
        op.drop_column("segments", name)


def create_partial_index(name: str, table: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def add_jumps(connection: sa.Connection) -> None:
    """Context by context, parents first: of each segment the rank, and the segment it jumps to."""
    of_key: dict[int, tuple[int, int | None]] = {}  # of the context that is being read
    place = {"context_key": -1, "number": 0}
    while rows := connection.execute(sa.text(READ), {**place, "limit": PAGE_ROWS}).all():
        changes = []
        for row in rows:
            if row.context_key != place["context_key"]:
                of_key = {}
            place = {"context_key": row.context_key, "number": row.number}
            of_key[row.key] = rank, jump_key = rank_and_jump(row.parent_key, of_key)
            if rank:
                changes.append({"key": row.key, "rank": rank, "jump_key": jump_key})
        if changes:
            connection.execute(sa.text(WRITE), changes)


def rank_and_jump(
    parent_key: int | None, of_key: dict[int, tuple[int, int | None]]
) -> tuple[int, int | None]:
    """As far again as the parent jumps, where the two jumps above it are equally far; else the parent."""
    if parent_key is None:
        return 0, None
    rank, jump_key = of_key.get(parent_key, (0, None))
    jump_rank, far_key = of_key.get(jump_key, (0, None)) if jump_key else (0, None)
    far_rank = of_key.get(far_key, (0, None))[0] if far_key else 0
    twice = far_key is not None and rank - jump_rank == jump_rank - far_rank
    return rank + 1, far_key if twice else parent_key
