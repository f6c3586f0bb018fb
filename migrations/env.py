"""Runs the migrations: for contextd on the connection that it gives, or for the alembic command.

contextd hands over a connection that is inside a transaction, and commits it itself. The command
reads the database from CONTEXTD_DATABASE, or from alembic.ini.
"""

import asyncio
import os
from typing import Any

from alembic import context
from alembic.autogenerate.api import AutogenContext
from alembic.util import CommandError
from sqlalchemy import Connection

from contextd.store.engines import StoreError, parse_url
from contextd.store.tables import Json, metadata
from contextd.store.upgrade import migration_engine

config = context.config


def render_item(kind: str, item: Any, autogen_context: AutogenContext) -> str | bool:
    """Write contextd's own column types as the plain ones that they are stored as.

    A migration is a record of its day and must not change with the class that it came from.
    """
    return "sa.Text()" if kind == "type" and isinstance(item, Json) else False


def run(connection: Connection) -> None:
    """Run what Alembic was asked for. SQLite changes a table by copying it (batch)."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_type=True,
        render_as_batch=connection.dialect.name == "sqlite",
        render_item=render_item,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_offline() -> None:
    """Print the SQL (`alembic upgrade head --sql`). The database's id is made while printing."""
    context.configure(
        url=database_url(), target_metadata=metadata, literal_binds=True, render_item=render_item
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_by_command() -> None:
    """Open the database as contextd would, run, and commit if all went well."""
    try:
        engine = migration_engine(parse_url(database_url()))
    except StoreError as error:
        raise CommandError(str(error)) from None
    try:
        async with engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await engine.dispose()


def database_url() -> str:
    """The database that the command means."""
    return os.environ.get("CONTEXTD_DATABASE") or str(config.get_main_option("sqlalchemy.url"))


given: Connection | None = config.attributes.get("connection")
if given is not None:
    run(given)
elif context.is_offline_mode():
    run_offline()
else:
    asyncio.run(run_by_command())
