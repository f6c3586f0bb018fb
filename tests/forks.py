"""A context of many forks, written straight into a database as contextd was before paths had jumps."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import text

from contextd.store.engines import make_engines

ROOT = Path(__file__).resolve().parent.parent
BEFORE_JUMPS = "0004"

# Message dN is the only one of segment N, which was forked off after dN-1; the branch of the last is
# the active one.
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :forks) "
DEEP = [
    "INSERT INTO contexts (key, id, state, state_detail, state_since, revision, record_revision,"
    " active_branch, mode, tools, approval_policy, on_busy, metadata, message_count, request_hash,"
    " created_at, changed_at) SELECT 1, 'deep', 'idle', '{}', 0, 1, 1, 'b' || :forks, 'act', '\"*\"',"
    " '{}', 'enqueue', '{}', :forks, 'x', 0, 0",
    "INSERT INTO segments (key, context_key, parent_key, parent_depth) " + NUMBERS + "SELECT i, 1,"
    " CASE WHEN i > 1 THEN i - 1 END, i - 1 FROM n",
    "INSERT INTO messages (key, context_key, id, parent_id, segment_key, depth, superseded, revision,"
    " opened_revision, role, kind, status, final_sequence, media_type, metadata, client_metadata,"
    " created_at, changed_at) "
    + NUMBERS
    + "SELECT i, 1, 'd' || i, CASE WHEN i > 1 THEN 'd' || (i - 1)"
    " END, i, i, false, 1, 1, 'user', 'text', 'completed', 1, 'text/plain', '{}', '{}', 0, 0 FROM n",
    "INSERT INTO heads (message_key, is_open, head, bytes, characters, fence, written_at) "
    + NUMBERS
    + "SELECT i, false, 1, 2, 2, 0, 0 FROM n",
    "INSERT INTO chunks (message_key, sequence, content, end_bytes, created_at) "
    + NUMBERS
    + "SELECT i, 1, 'hi', 2, 0 FROM n",
    "INSERT INTO branches (context_key, name, segment_key, leaf_key, leaf_depth, created_at) "
    + NUMBERS
    + "SELECT 1, 'b' || i, i, i, i, 0 FROM n",
]
SEQUENCES = ("contexts", "segments", "messages")


async def write_deep(database_url: str, environment: Mapping[str, str], forks: int) -> None:
    """Makes the database, of the schema that it was before, and in it the context `deep`."""
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", BEFORE_JUMPS],
        cwd=ROOT,
        env={**environment, "CONTEXTD_DATABASE": database_url},
        check=True,
        capture_output=True,
    )
    engines = make_engines(database_url, readers=1)
    async with engines.writer.begin() as connection:
        for statement in DEEP:
            await connection.execute(text(statement.replace(":forks", str(forks))))
        if engines.writer.dialect.name == "postgresql":  # the keys were not given by its sequences
            for table in SEQUENCES:
                sequence = f"pg_get_serial_sequence('{table}', 'key')"
                await connection.execute(
                    text(f"SELECT setval({sequence}, (SELECT max(key) FROM {table}))")
                )
    await engines.dispose()
