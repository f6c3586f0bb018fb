"""Presence: who starts alone knows it, and nobody else does."""

import asyncio
import errno
import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from contextd.store.engines import StoreError, make_engines
from contextd.store.presence import ADVISORY_MARK, Presence
from contextd.store.upgrade import ADVISORY_CLASS

# Says "alone" from inside the callback and waits there for a line; says how it came in, and waits
# for another line before it leaves.
PROCESS = """
import asyncio, sys
from contextd.store.presence import Presence

async def line():
    await asyncio.to_thread(sys.stdin.readline)

async def when_sole():
    print("alone", flush=True)
    await line()

async def main():
    presence = Presence(sys.argv[1])
    print("sole" if await presence.enter(when_sole) else "shared", flush=True)
    await line()
    await presence.leave()

asyncio.run(main())
"""


class Process:
    """A process that enters, driven by lines."""

    def __init__(self, database_url: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, database_url],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        self.go_on()
        assert self._process.wait() == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start(database_url: str, environment: dict[str, str]) -> Iterator[Callable[[], Process]]:
    processes: list[Process] = []

    def start_one() -> Process:
        processes.append(Process(database_url, environment))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()


async def nothing() -> None:
    pass


async def marks(database_url: str) -> list[int]:
    """The server processes that hold PostgreSQL's mark."""
    engines = make_engines(database_url, readers=1)
    query = text(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :class_"
        " AND objid = :object AND database = (SELECT oid FROM pg_database"
        " WHERE datname = current_database())"
    )
    async with engines.reader.connect() as connection:
        found = await connection.execute(query, {"class_": ADVISORY_CLASS, "object": ADVISORY_MARK})
        pids = list(found.scalars())
    await engines.dispose()
    return pids


async def until_marks(database_url: str, is_so: Callable[[list[int]], bool]) -> None:
    """PostgreSQL ends a session a moment after its client is gone."""
    if database_url.startswith("postgresql"):
        while not is_so(await marks(database_url)):
            await asyncio.sleep(0.01)


async def test_only_the_first_of_two_is_alone(database_url: str) -> None:
    """Who comes second is not alone; when both have left, the next is."""
    first, second, third = (Presence(database_url) for _ in range(3))
    assert await first.enter(nothing) is True
    assert await second.enter(nothing) is False
    await first.leave()
    await second.leave()
    assert await third.enter(nothing) is True
    await third.leave()


async def test_who_stays_keeps_others_from_being_alone(database_url: str) -> None:
    """The mark is shared: the one who came second counts as much as the first."""
    first, second, third = (Presence(database_url) for _ in range(3))
    await first.enter(nothing)
    await second.enter(nothing)
    await first.leave()
    assert await third.enter(nothing) is False
    await second.leave()
    await third.leave()


async def test_of_many_at_once_exactly_one_is_alone(database_url: str) -> None:
    """However many start together, one is alone, and its callback is the only one that runs."""
    calls: list[None] = []

    async def when_sole() -> None:
        calls.append(None)

    starters = [Presence(database_url) for _ in range(6)]
    outcomes = await asyncio.gather(*(starter.enter(when_sole) for starter in starters))
    assert sorted(outcomes) == [False] * 5 + [True]
    assert len(calls) == 1
    await asyncio.gather(*(starter.leave() for starter in starters))


async def test_nobody_enters_while_the_callback_runs(database_url: str) -> None:
    """What is left running is taken over before anybody else is there; a starter who gives up
    waiting leaves nothing behind."""
    first, second = Presence(database_url), Presence(database_url)
    waited: list[str] = []

    async def when_sole() -> None:
        try:
            async with asyncio.timeout(0.1):
                await second.enter(nothing)
        except TimeoutError:
            waited.append("second")

    assert await first.enter(when_sole) is True
    assert waited == ["second"]
    await first.leave()
    assert await second.enter(nothing) is True
    await second.leave()


async def test_a_failed_callback_leaves_no_mark(database_url: str) -> None:
    """What the callback raises is passed on, and the process counts as absent."""

    async def fail() -> None:
        raise LookupError("broken")

    failed, following = Presence(database_url), Presence(database_url)
    with pytest.raises(LookupError, match="broken"):
        await failed.enter(fail)
    assert await following.enter(nothing) is True
    await following.leave()
    await failed.leave()


async def test_leaving_is_harmless_at_any_time(database_url: str) -> None:
    """Also before entering, and twice."""
    presence = Presence(database_url)
    await presence.leave()
    await presence.enter(nothing)
    await presence.leave()
    await presence.leave()


async def test_a_killed_process_is_gone(database_url: str, start: Callable[[], Process]) -> None:
    """SIGKILL takes the mark away, and only that process's."""
    first = start()
    assert first.hear() == "alone"
    first.go_on()
    assert first.hear() == "sole"
    second = start()
    assert second.hear() == "shared"
    first.kill()
    await until_marks(database_url, lambda pids: len(pids) == 1)
    third = Presence(database_url)
    assert await third.enter(nothing) is False
    await third.leave()
    second.kill()
    await until_marks(database_url, lambda pids: not pids)
    fourth = Presence(database_url)
    assert await fourth.enter(nothing) is True
    await fourth.leave()


async def test_a_death_in_the_callback_passes_the_turn_on(
    database_url: str, start: Callable[[], Process]
) -> None:
    """Who waited for a starter that died is alone itself, and its callback runs."""
    first = start()
    assert first.hear() == "alone"
    waiting = Presence(database_url)
    entering = asyncio.create_task(waiting.enter(nothing))
    await asyncio.sleep(0)  # it has begun; how far it comes before the kill makes no difference
    first.kill()
    assert await entering is True
    await waiting.leave()


async def test_a_process_that_leaves_in_order_is_gone_at_once(
    database_url: str, start: Callable[[], Process]
) -> None:
    """After `leave` nothing holds the mark, and the process can end."""
    first = start()
    first.hear()
    first.go_on()
    first.hear()
    first.end()
    await until_marks(database_url, lambda pids: not pids)
    following = Presence(database_url)
    assert await following.enter(nothing) is True
    await following.leave()


async def test_a_broken_connection_gets_its_mark_back(postgresql_url: str) -> None:
    """PostgreSQL may restart under a living process: the mark is taken again by itself."""
    first, second = Presence(postgresql_url), Presence(postgresql_url)
    assert await first.enter(nothing) is True
    (before,) = await marks(postgresql_url)
    engines = make_engines(postgresql_url, readers=1)
    async with engines.reader.connect() as connection:
        await connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": before})
    await engines.dispose()
    await until_marks(postgresql_url, lambda pids: bool(pids) and before not in pids)
    assert await second.enter(nothing) is False
    await first.leave()
    await second.leave()
    assert await marks(postgresql_url) == []


async def test_one_file_under_two_names_is_one_database(sqlite_url: str, tmp_path: Path) -> None:
    """A link to the database, or a way around, names the same marks."""
    (tmp_path / "contextd.db").touch()
    (tmp_path / "link.db").symlink_to("contextd.db")
    first, second = Presence(sqlite_url), Presence(f"sqlite+aiosqlite:///{tmp_path}/link.db")
    assert await first.enter(nothing) is True
    assert await second.enter(nothing) is False
    await first.leave()
    await second.leave()


async def test_without_locks_nobody_is_alone(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot lock cannot tell, so the cautious answer is given."""

    def flock(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert await Presence(sqlite_url).enter(nothing) is False


async def test_a_mark_that_cannot_be_made_is_said_in_a_sentence(tmp_path: Path) -> None:
    """Not knowing would be mistaken for being alone, so the start fails."""
    with pytest.raises(StoreError, match="cannot be marked as present") as caught:
        await Presence(f"sqlite+aiosqlite:///{tmp_path}/missing/contextd.db").enter(nothing)
    assert "\n" not in str(caught.value)
