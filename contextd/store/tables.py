"""The schema, which Alembic compares against.

Rows refer to each other by integer keys; ids are what clients see. Times are milliseconds since the
epoch, UTC. JSON is text, encoded by msgspec. `contexts` is the lock: every transaction that touches
state or queue updates that row first. `heads` is narrow and has no other index, because each append
updates it.
"""

from typing import Any, TypeAlias

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    case,
    false,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement

# A row of any of these tables; its columns are read by their names.
AnyRow: TypeAlias = Row[*tuple[Any, ...]]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives only INTEGER PRIMARY KEY its fast row id; PostgreSQL wants 64 bits.
Key = BigInteger().with_variant(Integer(), "sqlite")


class Unreadable(dict[str, Any]):
    """In place of stored text that is no JSON: an empty object to whoever does not look closely."""


class Json(TypeDecorator[Any]):
    """A JSON value as text. Decodes to plain objects; who needs a type converts it.

    Text that is no JSON is `Unreadable`, so that it does not cost the whole answer.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        try:
            return msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError, UnicodeError, TypeError):
            return Unreadable()


class database_now_ms(FunctionElement[int]):  # noqa: N801 - reads as the SQL function that it is
    """The database's own clock, in milliseconds: leases of several processes are compared by it."""

    type = BigInteger()
    inherit_cache = True


@compiles(database_now_ms, "sqlite")
def _sqlite_now(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


@compiles(database_now_ms, "postgresql")
def _postgresql_now(element: Any, compiler: SQLCompiler, **kw: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


database = Table(
    "contextd_database",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("probe", Text, nullable=True),  # noise, written to find out whether writes are taken
)

contexts = Table(
    "contexts",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("state", String(32), nullable=False),
    Column("state_detail", Json, nullable=False),
    Column("state_since", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("record_revision", BigInteger, nullable=False),
    Column("active_turn_key", Key, nullable=True),
    Column("active_branch", String(64), nullable=False),
    Column("title", Text, nullable=True),
    Column("mode", String(8), nullable=False),
    Column("system_prompt", Text, nullable=True),
    Column("provider", Text, nullable=True),
    Column("model", Text, nullable=True),
    Column("tools", Json, nullable=False),
    Column("approval_policy", Json, nullable=False),
    Column("on_busy", String(16), nullable=False),
    Column("metadata", Json, nullable=False),
    Column("message_count", BigInteger, nullable=False),
    Column("request_hash", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("usage", Json, nullable=True),
    # A key is never given twice, also after a deletion: what is being purged must stay unreachable.
    sqlite_autoincrement=True,
)
Index(None, contexts.c.changed_at, contexts.c.key)
Index(None, contexts.c.state, contexts.c.changed_at, contexts.c.key)
_WAITS = text("state IN ('awaiting_tool_approval', 'awaiting_tool_results')")
Index(
    "ix_contexts_waiting",
    contexts.c.state_since,
    sqlite_where=_WAITS,
    postgresql_where=_WAITS,
)

# A segment is a run of messages with one parent each; a fork starts a new one and copies nothing.
segments = Table(
    "segments",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("context_key", Key, nullable=False),
    # Where it was forked off, and what a path jumps to that has nothing to look for on the way.
    Column("parent_key", Key, nullable=True),
    Column("parent_depth", Integer, nullable=False),
    Column("jump_key", Key, nullable=True),
    Column("rank", Integer, nullable=False, server_default="0"),  # how many are above it
    Column("number", Integer, nullable=False, server_default="0"),  # of the context's, from 1
)
Index(None, segments.c.context_key, segments.c.number)
Index(
    "ix_segments_forks",
    segments.c.parent_key,
    segments.c.parent_depth,
    sqlite_where=text("parent_key IS NOT NULL"),
    postgresql_where=text("parent_key IS NOT NULL"),
)

branches = Table(
    "branches",
    metadata,
    Column("context_key", Key, primary_key=True, autoincrement=False),
    Column("name", String(64), primary_key=True),
    Column("segment_key", Key, ForeignKey("segments.key"), nullable=False),
    Column("leaf_key", Key, nullable=True),
    Column("leaf_depth", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

Index(None, branches.c.context_key, branches.c.segment_key)
Index(None, branches.c.segment_key)

turns = Table(
    "turns",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("context_key", Key, nullable=False),
    Column("id", String(64), nullable=False),
    Column("branch", String(64), nullable=False),
    Column("user_message_key", Key, nullable=False),
    Column("status", String(16), nullable=False),
    Column("queue_position", BigInteger, nullable=True),
    Column("owner_id", String(64), nullable=True),
    Column("fence", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("retry_of", String(64), nullable=True),
    Column("started_at", BigInteger, nullable=True),
    Column("ended_at", BigInteger, nullable=True),
    # A turn may have stood still for months, with no server there to go on with it.
    Column("first_chunk_ms", Key, nullable=True),
    Column("phases", Json, nullable=False),
    Column("usage", Json, nullable=True),
    Column("error", Json, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("left_out", Json, nullable=True),
    Column("finish_reason", Text, nullable=True),  # of its last reply
    # Of a retry: it begins anew, and what was tried before is hidden from the model.
    Column("from_start", Boolean, nullable=False, server_default=false()),
    # Of a turn that was tried again: the key of its last message that the model is still shown. Null: all.
    Column("kept_to", BigInteger, nullable=True),
    UniqueConstraint("context_key", "id"),
)
Index(None, turns.c.context_key, turns.c.status, turns.c.queue_position)
Index(
    "ix_turns_running",
    turns.c.owner_id,
    sqlite_where=text("status = 'running'"),
    postgresql_where=text("status = 'running'"),
)
Index(
    "ix_turns_queued",
    turns.c.context_key,
    sqlite_where=text("status = 'queued'"),
    postgresql_where=text("status = 'queued'"),
)

# Who lives: each process keeps a row here, and with it the turns that name it as their owner.
nodes = Table(
    "nodes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("lease_expires_at", BigInteger, nullable=False),  # by the database's clock
)

messages = Table(
    "messages",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("context_key", Key, nullable=False),
    Column("id", String(64), nullable=False),
    Column("turn_id", String(64), nullable=True),
    Column("parent_id", String(64), nullable=True),
    # Null until it has its place in the tree: a queued message gets one when its turn starts.
    Column("segment_key", Key, nullable=True),
    Column("depth", Integer, nullable=True),
    Column("queued_branch", String(64), nullable=True),
    Column("superseded", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("opened_revision", BigInteger, nullable=False),
    Column("role", String(16), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("final_sequence", BigInteger, nullable=True),
    Column("media_type", Text, nullable=False),
    Column("finish_reason", Text, nullable=True),
    Column("usage", Json, nullable=True),
    Column("error", Json, nullable=True),
    Column("metadata", Json, nullable=False),
    Column("client_metadata", Json, nullable=False),
    Column("stats", Json, nullable=True),
    Column("payload_hash", String(64), nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger, nullable=True),
    UniqueConstraint("context_key", "id"),
    sqlite_autoincrement=True,
)
Index(None, messages.c.context_key, messages.c.revision)
Index(None, messages.c.segment_key, messages.c.depth)
Index(None, messages.c.context_key, messages.c.turn_id)
Index(
    "ix_messages_open",
    messages.c.context_key,
    sqlite_where=text("status = 'streaming'"),
    postgresql_where=text("status = 'streaming'"),
)
Index(
    "ix_messages_queued",
    messages.c.context_key,
    sqlite_where=text("queued_branch IS NOT NULL"),
    postgresql_where=text("queued_branch IS NOT NULL"),
)

heads = Table(
    "heads",
    metadata,
    Column("message_key", Key, primary_key=True, autoincrement=False),
    Column("is_open", Boolean, nullable=False),
    Column("head", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("characters", BigInteger, nullable=False),
    # Of a turn's message its fence, of a produced one the producer's epoch.
    Column("fence", Key, nullable=False),
    Column("producer_id", String(64), nullable=True),
    Column(
        "written_at", BigInteger, nullable=False
    ),  # of the last write; grows with each, see `stamp`
)


def stamp(now: int) -> ColumnElement[int]:
    """`written_at` after one more write: another than before, also where the clock was set back."""
    return case((heads.c.written_at >= now, heads.c.written_at + 1), else_=now)


chunks = Table(
    "chunks",
    metadata,
    Column("message_key", Key, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
    # UTF-8 bytes of chunks 1 to this one: a pull is cut to its limit by the index, unread.
    Column("end_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

tool_calls = Table(
    "tool_calls",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("context_key", Key, nullable=False),
    Column("id", String(64), nullable=False),
    Column("turn_id", String(64), nullable=False),
    # The message that its arguments were streamed into, and the one with its result.
    Column("message_key", Key, nullable=False),
    Column("round", Integer, nullable=False),
    Column("call_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("arguments", Json, nullable=True),
    Column("status", String(16), nullable=False),
    Column("requires_approval", Boolean, nullable=False),
    Column("external", Boolean, nullable=False),
    # Its round has its results: the model was, or is to be, asked again.
    Column("collected", Boolean, nullable=False),
    Column("error", Text, nullable=True),
    Column("result_message_key", Key, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("decided_at", BigInteger, nullable=True),
    Column("started_at", BigInteger, nullable=True),
    Column("ended_at", BigInteger, nullable=True),
    # What the model's server wants back with the call.
    Column("attached", Json, nullable=True),
    UniqueConstraint("context_key", "id"),
    sqlite_autoincrement=True,
)
Index(None, tool_calls.c.context_key, tool_calls.c.turn_id)
Index(None, tool_calls.c.message_key)

journal = Table(
    "journal",
    metadata,
    Column("context_key", Key, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("turn_id", String(64), nullable=True),
    Column("trigger", String(32), nullable=False),
    Column("from_state", String(32), nullable=False),
    Column("to_state", String(32), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("detail", Json, nullable=False),
    sqlite_with_rowid=False,
)

# An id is never used twice, so a deleted context leaves its id here, and what is still to be purged.
tombstones = Table(
    "tombstones",
    metadata,
    Column("context_id", String(64), primary_key=True),
    Column("context_key", Key, nullable=False),
    Column("purged", Boolean, nullable=False),
    Column("deleted_at", BigInteger, nullable=False),
)
