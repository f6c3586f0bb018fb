"""The misbehaving server in a thread of its own, and the command line in this one."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from cli_parts import Ran, Screen, Served, serving

from contextd.cli import main


@pytest.fixture
def fake() -> Iterator[Served]:
    fake, ready, stop = Served(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serving(fake):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: fake.loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(5)
    yield fake
    fake.loop.call_soon_threadsafe(stop.set)
    thread.join()
    fake.loop.close()


@pytest.fixture
def url(fake: Served) -> str:
    """The server of all that is run here: the fake, unless a module has another."""
    return fake.url


@pytest.fixture
def contextd(
    url: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., Ran]:
    """`contextd *arguments` in this process, its output in a pipe."""
    monkeypatch.setenv("CONTEXTD_URL", url)

    def run(*arguments: str) -> Ran:
        capfdbinary.readouterr()
        code = main(arguments)
        out, err = capfdbinary.readouterr()
        return Ran(code, out, err.decode())

    return run


@pytest.fixture
def command(url: str, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The same as a command line and an environment, for a process of its own."""
    return [sys.executable, "-m", "contextd"], environment | {"CONTEXTD_URL": url}


@pytest.fixture
def on_screen(command: tuple[list[str], dict[str, str]]) -> Callable[..., Screen]:
    """Starts `contextd *arguments` on a terminal."""

    def start(*arguments: str, **more: str) -> Screen:
        return Screen([*command[0], *arguments], command[1] | {"TERM": "xterm"} | more)

    return start
