"""initial schema"""

import secrets
import string
import time
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
JSON = sa.Text
ID_ALPHABET = string.ascii_lowercase + string.digits
ID_CHARS = 8


def upgrade() -> None:
    create_database()
    create_contexts()
    create_tree()
    create_turns()
    create_messages()
    create_content()
    create_history()


def downgrade() -> None:
    for name in (
        "tombstones",
        "journal",
        "chunks",
        "heads",
        "messages",
        "turns",
        "branches",
        "segments",
        "contexts",
        "contextd_database",
    ):
        op.drop_table(name)


def create_database() -> None:
    table = op.create_table(
        "contextd_database",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_contextd_database")),
    )
    id_ = "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_CHARS))
    op.bulk_insert(table, [{"id": id_, "created_at": time.time_ns() // 1_000_000}])


def create_contexts() -> None:
    op.create_table(
        "contexts",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("state_detail", JSON, nullable=False),
        sa.Column("state_since", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("record_revision", sa.BigInteger, nullable=False),
        sa.Column("active_turn_key", KEY, nullable=True),
        sa.Column("active_branch", sa.String(64), nullable=False),
        sa.Column("title", sa.Text, nullable=True),
        sa.Column("mode", sa.String(8), nullable=False),
        sa.Column("system_prompt", sa.Text, nullable=True),
        sa.Column("provider", sa.Text, nullable=True),
        sa.Column("model", sa.Text, nullable=True),
        sa.Column("tools", JSON, nullable=False),
        sa.Column("approval_policy", JSON, nullable=False),
        sa.Column("on_busy", sa.String(16), nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("message_count", sa.BigInteger, nullable=False),
        sa.Column("request_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_contexts")),
        sa.UniqueConstraint("id", name=op.f("uq_contexts_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_contexts_changed_at_key"), "contexts", ["changed_at", "key"])


def create_tree() -> None:
    op.create_table(
        "segments",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("context_key", KEY, nullable=False),
        sa.Column("parent_key", KEY, nullable=True),
        sa.Column("parent_depth", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_segments")),
    )
    op.create_index(op.f("ix_segments_context_key"), "segments", ["context_key"])
    op.create_table(
        "branches",
        sa.Column("context_key", KEY, autoincrement=False, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("segment_key", KEY, nullable=False),
        sa.Column("leaf_key", KEY, nullable=True),
        sa.Column("leaf_depth", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("context_key", "name", name=op.f("pk_branches")),
        sa.ForeignKeyConstraint(
            ["segment_key"], ["segments.key"], name=op.f("fk_branches_segment_key")
        ),
    )


def create_turns() -> None:
    op.create_table(
        "turns",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("context_key", KEY, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("branch", sa.String(64), nullable=False),
        sa.Column("user_message_key", KEY, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("queue_position", sa.BigInteger, nullable=True),
        sa.Column("owner_id", sa.String(64), nullable=True),
        sa.Column("lease_expires_at", sa.BigInteger, nullable=True),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("retry_of", sa.String(64), nullable=True),
        sa.Column("started_at", sa.BigInteger, nullable=True),
        sa.Column("ended_at", sa.BigInteger, nullable=True),
        sa.Column("first_chunk_ms", sa.Integer, nullable=True),
        sa.Column("phases", JSON, nullable=False),
        sa.Column("usage", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_turns")),
        sa.UniqueConstraint("context_key", "id", name=op.f("uq_turns_context_key_id")),
    )
    op.create_index(
        op.f("ix_turns_context_key_status_queue_position"),
        "turns",
        ["context_key", "status", "queue_position"],
    )
    create_partial_index("ix_turns_running", "turns", "lease_expires_at", "status = 'running'")


def create_messages() -> None:
    op.create_table(
        "messages",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("context_key", KEY, nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("turn_id", sa.String(64), nullable=True),
        sa.Column("parent_id", sa.String(64), nullable=True),
        sa.Column("segment_key", KEY, nullable=True),
        sa.Column("depth", sa.Integer, nullable=True),
        sa.Column("queued_branch", sa.String(64), nullable=True),
        sa.Column("superseded", sa.Boolean, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("opened_revision", sa.BigInteger, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("final_sequence", sa.BigInteger, nullable=True),
        sa.Column("media_type", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.Text, nullable=True),
        sa.Column("usage", JSON, nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("client_metadata", JSON, nullable=False),
        sa.Column("stats", JSON, nullable=True),
        sa.Column("payload_hash", sa.String(64), nullable=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.Column("completed_at", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_messages")),
        sa.UniqueConstraint("context_key", "id", name=op.f("uq_messages_context_key_id")),
        sqlite_autoincrement=True,
    )
    for columns in (
        ["context_key", "revision"],
        ["segment_key", "depth"],
        ["context_key", "turn_id"],
    ):
        op.create_index(op.f(f"ix_messages_{'_'.join(columns)}"), "messages", columns)
    create_partial_index("ix_messages_open", "messages", "context_key", "status = 'streaming'")


def create_content() -> None:
    op.create_table(
        "heads",
        sa.Column("message_key", KEY, autoincrement=False, nullable=False),
        sa.Column("is_open", sa.Boolean, nullable=False),
        sa.Column("head", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("characters", sa.BigInteger, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("producer_id", sa.String(64), nullable=True),
        sa.Column("written_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("message_key", name=op.f("pk_heads")),
    )
    op.create_table(
        "chunks",
        sa.Column("message_key", KEY, autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("end_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("message_key", "sequence", name=op.f("pk_chunks")),
        sqlite_with_rowid=False,
    )


def create_history() -> None:
    op.create_table(
        "journal",
        sa.Column("context_key", KEY, autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("turn_id", sa.String(64), nullable=True),
        sa.Column("trigger", sa.String(32), nullable=False),
        sa.Column("from_state", sa.String(32), nullable=False),
        sa.Column("to_state", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("duration_ms", sa.BigInteger, nullable=False),
        sa.Column("detail", JSON, nullable=False),
        sa.PrimaryKeyConstraint("context_key", "revision", name=op.f("pk_journal")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tombstones",
        sa.Column("context_id", sa.String(64), nullable=False),
        sa.Column("context_key", KEY, nullable=False),
        sa.Column("purged", sa.Boolean, nullable=False),
        sa.Column("deleted_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("context_id", name=op.f("pk_tombstones")),
    )


def create_partial_index(name: str, table: str, column: str, condition: str) -> None:
    """An index of only the rows that meet `condition`: those that are still under way."""
    where = sa.text(condition)
    op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)
