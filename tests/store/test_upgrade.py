"""Upgrades: a database becomes contextd's newest, or is refused and left as it was."""

import asyncio
import logging
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, inspect, text

from contextd.store import tables
from contextd.store.engines import StoreError, make_engines
from contextd.store.upgrade import ADVISORY_CLASS, ADVISORY_UPGRADE, find_incarnation, upgrade

ROOT = Path(__file__).resolve().parents[2]
UPGRADE = """
import asyncio, sys
from contextd.store.upgrade import upgrade
print("ready", flush=True)
sys.stdin.readline()
print(asyncio.run(upgrade(sys.argv[1])))
"""
NEWEST = max(path.name[:4] for path in (ROOT / "migrations/versions").glob("[0-9]*.py"))
# A later migration that adds a column the way Alembic does on SQLite, by copying the table.
ADD_COLUMN = f"""
import sqlalchemy as sa
from alembic import op
revision = "9999"
down_revision = "{NEWEST}"
def upgrade():
    with op.batch_alter_table("segments", recreate="auto") as batch:
        batch.alter_column("parent_depth", type_=sa.BigInteger())
        batch.add_column(sa.Column("note", sa.Text()))
"""
BREAK_HALF_WAY = ADD_COLUMN + "    raise RuntimeError('half-way')\n"

Tree = Callable[[str], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes a checkout of contextd that has one more migration."""

    def make(migration: str) -> Path:
        copy = tmp_path / "tree"
        shutil.copytree(ROOT / "contextd", copy / "contextd")
        shutil.copytree(ROOT / "migrations", copy / "migrations")
        (copy / "migrations/versions/9999_more.py").write_text(migration)
        return copy

    return make


def run_upgrade(database_url: str, environment: dict[str, str], root: Path = ROOT) -> str:
    """The id that a process printed; raises with its standard error when it failed."""
    done = subprocess.run(
        [sys.executable, "-c", UPGRADE, database_url],
        cwd=root,  # which Python looks into before PYTHONPATH
        env=environment | {"PYTHONPATH": str(root)},
        input="\n",
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.removeprefix("ready\n").strip()


async def execute(database_url: str, *statements: str) -> None:
    engines = make_engines(database_url, readers=1)
    async with engines.writer.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))
    await engines.dispose()


async def values(database_url: str, query: str) -> list[object]:
    engines = make_engines(database_url, readers=1)
    async with engines.reader.connect() as connection:
        found = list((await connection.execute(text(query))).scalars())
    await engines.dispose()
    return found


async def table_names(database_url: str) -> set[str]:
    engines = make_engines(database_url, readers=1)

    def names(connection: Connection) -> set[str]:
        return set(inspect(connection).get_table_names())

    async with engines.reader.connect() as connection:
        found = await connection.run_sync(names)
    await engines.dispose()
    return found


def path_of(sqlite_url: str) -> Path:
    return Path(sqlite_url.removeprefix("sqlite+aiosqlite:///"))


def run_sqlite(path: Path, *statements: str) -> None:
    """As another program would do it: without WAL, in a file of its own making."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


async def refused(database_url: str) -> str:
    """The sentence that an upgrade is refused with."""
    with pytest.raises(StoreError) as caught:
        await upgrade(database_url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_a_new_database_gets_every_table_and_an_id(database_url: str) -> None:
    """The id is short, of letters and digits, and a later upgrade finds the same incarnation."""
    incarnation = await upgrade(database_url)
    assert re.fullmatch("[a-z0-9]{8,12}", incarnation)
    assert await table_names(database_url) == set(tables.metadata.tables) | {"alembic_version"}
    assert await upgrade(database_url) == incarnation
    (database_id,) = await values(database_url, "SELECT id FROM contextd_database")
    assert re.fullmatch("[a-z0-9]{8}", str(database_id))


async def test_every_database_has_an_id_of_its_own(tmp_path: Path) -> None:
    """A cursor of another database must not look like one of this."""
    ids = {await upgrade(f"sqlite+aiosqlite:///{tmp_path}/{name}.db") for name in "abc"}
    assert len(ids) == 3


async def test_the_migrations_make_what_the_tables_say(sqlite_url: str, tmp_path: Path) -> None:
    """To the letter, with what Alembic does not compare: WITHOUT ROWID, AUTOINCREMENT, partial
    indexes."""
    await upgrade(sqlite_url)
    engine = create_engine(f"sqlite:///{tmp_path}/wanted.db")
    tables.metadata.create_all(engine)
    engine.dispose()
    assert schema(path_of(sqlite_url)) == schema(tmp_path / "wanted.db")


def schema(path: Path) -> dict[str, str]:
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
    with closing(sqlite3.connect(path)) as connection:
        return {name: " ".join(sql.split()) for name, sql in connection.execute(query)}


async def test_six_processes_that_start_at_once_agree(
    database_url: str, environment: dict[str, str]
) -> None:
    """Also on the very first start: one creates the database, all find the same one, none prints
    anything else."""
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADE, database_url],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("\n")
        starter.stdin.flush()
    answers = [starter.communicate() for starter in starters]
    assert {error for _, error in answers} == {""}
    (said,) = {output for output, _ in answers}
    ids = await values(database_url, "SELECT id FROM contextd_database")
    assert len(ids) == 1
    # On PostgreSQL it is the incarnation, which is made of this id and of what the database is.
    assert said.strip() == (
        ids[0] if "sqlite" in database_url else await find_incarnation(database_url)
    )
    assert await table_names(database_url) == set(tables.metadata.tables) | {"alembic_version"}


async def test_what_happened_while_waiting_for_the_lock_counts(postgresql_url: str) -> None:
    """The database is looked at inside the lock: who waited for it must not act on an older look."""
    engines = make_engines(postgresql_url, readers=1)
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    async with engines.writer.begin() as holder, engines.reader.connect() as watcher:
        lock = f"SELECT pg_advisory_xact_lock({ADVISORY_CLASS}, {ADVISORY_UPGRADE})"
        await holder.execute(text(lock))
        refusal = asyncio.create_task(refused(postgresql_url))
        while not (await watcher.execute(waiting)).scalar():
            assert not refusal.done()
        await holder.execute(text("CREATE TABLE customers (id INTEGER)"))
    assert "tables of another program" in await refusal
    await engines.dispose()


async def test_one_process_can_upgrade_several_databases_at_once(
    sqlite_url: str, postgresql_url: str
) -> None:
    """Alembic keeps its state in globals; the upgrades must not meet there."""
    urls = [postgresql_url, *(f"{sqlite_url}{number}" for number in range(3))]
    ids = await asyncio.gather(*(upgrade(url) for url in urls))
    assert [await upgrade(url) for url in urls] == ids


async def test_a_sqlite_database_is_switched_to_wal(
    sqlite_url: str, environment: dict[str, str]
) -> None:
    """Also one that the alembic command made without it."""
    alembic(environment | {"CONTEXTD_DATABASE": sqlite_url}, "upgrade", "head")
    assert journal_mode(sqlite_url) == "delete"
    await upgrade(sqlite_url)
    assert journal_mode(sqlite_url) == "wal"


def journal_mode(sqlite_url: str) -> str:
    with closing(sqlite3.connect(path_of(sqlite_url))) as connection:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])


async def test_an_upgrade_leaves_logging_and_standard_output_alone(
    database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The program's logging is its own: nothing is set up, nothing is disabled."""
    mine, root = logging.getLogger("mine"), logging.getLogger()
    before = (root.level, list(root.handlers), mine.disabled)
    await upgrade(database_url)
    assert (root.level, list(root.handlers), mine.disabled) == before
    assert capfd.readouterr() == ("", "")


async def test_an_empty_database_may_already_be_there(
    sqlite_url: str, environment: dict[str, str]
) -> None:
    """An empty file is no other program's, nor is what `alembic downgrade base` leaves."""
    path_of(sqlite_url).touch()
    first = await upgrade(sqlite_url)
    alembic(environment | {"CONTEXTD_DATABASE": sqlite_url}, "downgrade", "base")
    assert await table_names(sqlite_url) == {"alembic_version"}
    assert await upgrade(sqlite_url) != first


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
async def test_a_newer_sqlite_database_is_left_byte_for_byte(
    sqlite_url: str, journal_mode: str
) -> None:
    """An older contextd does not guess: it refuses, and not even the journal mode is changed."""
    path = path_of(sqlite_url)
    await upgrade(sqlite_url)
    run_sqlite(path, "UPDATE alembic_version SET version_num = 'ffff'")
    run_sqlite(path, f"PRAGMA journal_mode={journal_mode}")
    before = path.read_bytes()
    sentence = await refused(sqlite_url)
    assert "written by a newer contextd (revision ffff)" in sentence
    assert path.read_bytes() == before


async def test_a_newer_postgresql_database_is_left_alone(postgresql_url: str) -> None:
    """The same on PostgreSQL."""
    await upgrade(postgresql_url)
    await execute(
        postgresql_url,
        "UPDATE alembic_version SET version_num = 'ffff'",
        "DROP TABLE tombstones",
    )
    assert "written by a newer contextd (revision ffff)" in await refused(postgresql_url)
    assert "tombstones" not in await table_names(postgresql_url)
    assert await values(postgresql_url, "SELECT version_num FROM alembic_version") == ["ffff"]


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE customers (id INTEGER)"],
        ["CREATE TABLE contexts (id INTEGER)"],
        [
            "CREATE TABLE alembic_version (version_num VARCHAR(32))",
            "INSERT INTO alembic_version VALUES ('0001')",
        ],
    ],
    ids=["tables", "tables of the same name", "Alembic's"],
)
async def test_another_programs_sqlite_database_is_left_byte_for_byte(
    sqlite_url: str, statements: list[str]
) -> None:
    """A slip in the settings must not put contextd's tables among somebody's own."""
    path = path_of(sqlite_url)
    run_sqlite(path, *statements)
    before = path.read_bytes()
    assert "tables of another program" in await refused(sqlite_url)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


async def test_another_programs_postgresql_database_is_left_alone(postgresql_url: str) -> None:
    """The same on PostgreSQL."""
    await execute(postgresql_url, "CREATE TABLE customers (id INTEGER)")
    assert "tables of another program" in await refused(postgresql_url)
    assert await table_names(postgresql_url) == {"customers"}


async def test_a_file_that_is_no_database_is_left_byte_for_byte(sqlite_url: str) -> None:
    """Somebody's notes, for instance."""
    path = path_of(sqlite_url)
    path.write_text("Dear diary, " * 100)
    before = path.read_bytes()
    assert "not a SQLite database" in await refused(sqlite_url)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


async def test_a_path_that_cannot_be_is_named(tmp_path: Path) -> None:
    """No folder is made: a mistyped path would otherwise begin an empty database."""
    url = f"sqlite+aiosqlite:///{tmp_path}"
    assert "is a folder" in await refused(url)
    assert f"{tmp_path}/missing for the database" in await refused(f"{url}/missing/contextd.db")
    assert not (tmp_path / "missing").exists()


async def test_a_path_may_hold_what_urls_give_a_meaning(tmp_path: Path) -> None:
    """The file is opened as a URI for the first look, so its name has to be quoted there."""
    folder = tmp_path / "50% of #1, a b"
    folder.mkdir()
    url = f"sqlite+aiosqlite:///{folder}/contextd.db"
    assert await upgrade(url) == await upgrade(url)
    assert (folder / "contextd.db").exists()


async def test_an_unreachable_server_is_said_in_a_sentence(postgresql_url: str) -> None:
    """One line, and no password."""
    away = "postgresql+asyncpg://user:secret@127.0.0.1:1/name"
    assert "secret" not in await refused(away)
    assert "cannot be used" in await refused(away)
    assert "sslmode" in await refused(f"{postgresql_url}&sslmode=require")
    assert "does not exist" in await refused(postgresql_url.replace("/test_", "/missing_"))


async def test_a_crash_of_another_program_is_repaired_first(
    sqlite_url: str, environment: dict[str, str]
) -> None:
    """A process that died in the middle of a write leaves a journal that must be rolled back before
    anyone can read."""
    path = path_of(sqlite_url)
    database_id = await upgrade(sqlite_url)
    run_sqlite(path, "PRAGMA journal_mode=delete")
    crash = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA cache_size=1'); c.execute('BEGIN IMMEDIATE');"
        "c.execute('DELETE FROM contextd_database');"
        "[c.execute('INSERT INTO tombstones VALUES (?, 1, 0, 0)', (str(i) * 60,))"
        " for i in range(2000)]; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", crash, str(path)], env=environment, check=False)
    assert path.with_name("contextd.db-journal").stat().st_size > 0
    assert await upgrade(sqlite_url) == database_id
    assert await values(sqlite_url, "SELECT count(*) FROM tombstones") == [0]


async def test_a_migration_that_fails_leaves_nothing(
    database_url: str, environment: dict[str, str], tree: Tree
) -> None:
    """All or nothing: after a failed first start the database is as empty as before."""
    with pytest.raises(RuntimeError, match="half-way"):
        run_upgrade(database_url, environment, tree(BREAK_HALF_WAY))
    assert await table_names(database_url) == set()
    assert await upgrade(database_url)


async def test_a_later_migration_keeps_every_row(
    database_url: str, environment: dict[str, str], tree: Tree
) -> None:
    """SQLite changes a table by copying and dropping it; rows that refer to it must survive."""
    database_id = await upgrade(database_url)
    await execute(
        database_url,
        "INSERT INTO segments (key, context_key, parent_depth) VALUES (1, 1, 0)",
        "INSERT INTO branches VALUES (1, 'main', 1, NULL, 0, 0)",
    )
    assert run_upgrade(database_url, environment, tree(ADD_COLUMN)) == database_id
    assert await values(database_url, "SELECT name FROM branches") == ["main"]
    assert await values(database_url, "SELECT note FROM segments") == [None]
    assert "written by a newer contextd (revision 9999)" in await refused(database_url)


def alembic(
    environment: dict[str, str], *arguments: str, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_alembic_command_works_from_the_top(
    database_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """`check` knows an old database from a new one, and a new migration finds nothing to do."""
    environment = environment | {"CONTEXTD_DATABASE": database_url}
    assert "not up to date" in alembic(environment, "check").stdout
    assert alembic(environment, "upgrade", "head").returncode == 0
    check = alembic(environment, "check")
    assert (check.returncode, check.stdout) == (0, "No new upgrade operations detected.\n")

    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "migrations", copy / "migrations")
    shutil.copy(ROOT / "alembic.ini", copy)
    made = alembic(environment, "revision", "--autogenerate", "-m", "nothing", folder=copy)
    assert made.returncode == 0, made.stderr
    (path,) = (copy / "migrations/versions").glob("*_nothing.py")
    assert re.findall(r"^    (?!#)(.*)$", path.read_text(), re.MULTILINE) == ["pass", "pass"]


def test_the_alembic_command_refuses_in_a_sentence(environment: dict[str, str]) -> None:
    """The same URLs as for contextd, and the same words."""
    done = alembic(environment | {"CONTEXTD_DATABASE": "sqlite:///contextd.db"}, "check")
    assert done.returncode != 0
    assert "must begin with sqlite+aiosqlite://" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_wheel_brings_its_migrations(
    sqlite_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """`contextd serve` upgrades by itself, so an installed contextd must find them beside itself."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    migrations = tmp_path / "installed/contextd/migrations"
    assert {path.name for path in migrations.glob("*.py")} == {"env.py"}
    assert (migrations / "versions/0001_initial_schema.py").is_file()
    assert run_upgrade(sqlite_url, environment, tmp_path / "installed")
