"""§12 at the wire: a database that fails under the running server, or at its start."""

import asyncio
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from producing import Pen
from serving import Server
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from wire import Api, ok, problem, script, until

FAST = {"scripted_rate": 0}
UNLIMITED = resource.RLIM_INFINITY


def ready(api: Api) -> httpx.Response:
    return api.http.get("/health/ready")


def not_ready(api: Api) -> str:
    """The reason, from the problem."""
    return str(problem(ready(api), 503, "overloaded")["detail"])


# Trouble that may pass


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_full_disk(tmp_path: Path) -> None:
    """Writes are 503 and ready says why, also with nobody writing; with room again both are well.

    The limit of a process's files stands for the disk's. A turn that met it goes on to its end.
    """
    database = tmp_path / "contextd.db"
    with Server(database, settings=FAST) as server:
        api = Api(server.url)
        context_id = api.create()
        turn = api.send(context_id, script({"text": "a "}, {"delay_ms": 1500}, {"text": "b"}))
        api.opened(context_id)
        size = os.path.getsize(f"{database}-wal")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, UNLIMITED))
        refusal = problem(api.http.post("/contexts", json={"id": "full"}), 503, "overloaded")
        assert "the disk" in refusal["detail"]
        assert "the disk" in not_ready(api)
        assert "the disk" in not_ready(api)
        ok(api.http.get("/health/live"))
        until(lambda: server.log.count("did not take a write") > 3, "the turn's tries")
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        ok(ready(api))
        assert api.create(id="full") == "full"
        assert api.ended(context_id, turn["turn_id"])["status"] == "completed"
        api.close()
    assert "SQLITE_IOERR" in server.log
    assert "Traceback" not in server.log


# Trouble that never passes


FORBID = {
    "sqlite": (
        "CREATE TRIGGER forbid BEFORE INSERT ON chunks WHEN NEW.content = 'poison '"
        " BEGIN SELECT RAISE(ABORT, 'poison is forbidden'); END",
        "SQLITE_CONSTRAINT_TRIGGER",
    ),
    "postgresql": ("ALTER TABLE chunks ADD CHECK (content <> 'poison ')", "23514"),
}


async def execute(database_url: str, statement: str) -> None:
    engine = create_async_engine(database_url)
    async with engine.begin() as connection:
        await connection.execute(text(statement))
    await engine.dispose()


def test_what_can_never_be_stored(database_url: str) -> None:
    """A write is 500 and its turn fails at once; the log has the code, and nothing of the chat.

    The database refuses some rows, in words that quote them.
    """
    statement, code = FORBID[make_url(database_url).get_backend_name()]
    with Server(database_url, settings=FAST) as server:
        asyncio.run(execute(database_url, statement))
        api = Api(server.url)
        _, turn = api.run(api.create(), script({"text": "good poison "}))
        assert (turn["status"], turn["error"]["type"]) == ("failed", "internal_error")
        assert turn["attempt"] == 1
        pen = Pen(api, api.create())
        pen.open()
        pen.write("a")
        problem(pen.batch({"content": "b"}, {"content": "poison "}), 500, "internal_error")
        assert pen.write("c")["sequence"] == 2
        ok(ready(api))
        api.close()
    assert code in server.log
    assert "poison" not in server.log


# A file that is not there any more


def deleted(database: Path) -> None:
    for path in database.parent.glob("contextd.db*"):
        path.unlink()


def replaced(database: Path) -> None:
    shutil.copy(database.with_name("backup.db"), database.with_name("new.db"))
    database.with_name("new.db").replace(database)


def log_deleted(database: Path) -> None:
    database.with_name("contextd.db-wal").unlink()


def moved_away(database: Path) -> None:
    database.rename(database.with_name("moved.db"))


LOSSES = [deleted, replaced, log_deleted, moved_away]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: str(lose.__name__))
def test_a_database_that_is_lost(lose: Callable[[Path], None], tmp_path: Path) -> None:
    """Nothing is acknowledged that will not be there, and ready says it before anybody writes."""
    database = tmp_path / "contextd.db"
    with Server(database.with_name("backup.db")) as server:
        Api(server.url).create(id="from-backup")
    with Server(database, settings=FAST) as server:
        api = Api(server.url)
        pen = Pen(api, api.create(id="here"))
        pen.open()
        ok(ready(api))
        lose(database)
        assert "deleted or replaced" in not_ready(api)
        problem(api.http.post("/contexts", json={}), 500, "internal_error")
        problem(api.post_message("here", "hello"), 500, "internal_error")
        problem(pen.post({"content": "b"}), 500, "internal_error")
        if lose is moved_away:
            assert not database.exists()
            database.with_name("moved.db").rename(database)
            ok(ready(api))
            assert pen.write("b")["sequence"] == 1
        api.close()
    with Server(database, settings=FAST) as server:
        kept = [context["id"] for context in Api(server.url).walk("/contexts")]
    assert kept == {replaced: ["from-backup"], deleted: []}.get(lose, ["here"])
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# Starts that fail


def full(path: Path) -> None:
    """Nothing at all may be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def start(path: Path | str, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """The exit code and standard error of a server that is expected not to start."""
    url = path if isinstance(path, str) else f"sqlite+aiosqlite:///{path}"
    done = subprocess.run(
        [sys.executable, "-m", "contextd", "serve", "--port", "0", "--database", url],
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def damage(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xa5" * (len(whole) - 8192))


def test_a_start_that_fails_is_one_line(tmp_path: Path) -> None:
    """Each names what is wrong, and leaves what it found as it was."""
    good = tmp_path / "good.db"
    Server(good).start().stop()
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("no database " * 1000)
    shutil.copy(good, tmp_path / "damaged.db")
    damage(tmp_path / "damaged.db")
    os.mkfifo(tmp_path / "pipe.db")
    (tmp_path / "circle.db").symlink_to("circle.db")
    cases: list[tuple[Path | str, str]] = [
        (tmp_path / "folder.db", "is a folder"),
        (tmp_path / "nowhere" / "contextd.db", "does not exist"),
        (tmp_path / "text.db", "is not a SQLite database"),
        (tmp_path / "damaged.db", "is damaged"),
        (tmp_path / "pipe.db", "is a device or a pipe"),
        (tmp_path / "circle.db", "leads nowhere"),
        (tmp_path / ("x" * 300), "leads nowhere"),
        (tmp_path / "what?.db", "written as %3F"),
    ]
    before = (tmp_path / "damaged.db").read_bytes()
    for path, words in cases:
        check_refused(*start(path), words)
    for name in ("new.db", "good.db"):
        code, line = start(tmp_path / name, lambda: full(good))
        check_refused(code, line, "the disk")
    assert (tmp_path / "damaged.db").read_bytes() == before
    assert not (tmp_path / "what").exists()


def check_refused(code: int, line: str, words: str) -> None:
    assert code == 1
    assert words in line
    assert line.startswith("contextd: ")
    assert line.count("\n") == 1
