"""Processes of a benchmark: servers and clients, each on its own, spoken to in lines."""

import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

TESTS = Path(__file__).resolve().parent.parent
ANSWER_S = 120  # a process that says nothing for so long is killed, and the run fails
LISTENS = "listens on "


class Command:
    """A process whose standard output is read line by line."""

    def __init__(self, command: Sequence[str], *, environ: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            env=_environ() | dict(environ or {}),
            cwd=TESTS,  # which Python puts before everything else
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def read_line(self) -> str:
        """The next line. Raises `RuntimeError` when the process ends, or says nothing in time."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended early: {self._process.args!r}")
        return line

    def read(self) -> Any:
        """The next line, which is JSON."""
        return msgspec.json.decode(self.read_line())

    def read_url(self) -> str:
        """The address that a server says it listens on."""
        while LISTENS not in (line := self.read_line()):
            pass
        return line.split(LISTENS, 1)[1].split()[0]

    def release(self) -> None:
        """Ends a client that waits for the end of its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> int:
        """SIGTERM; returns the exit code once the process is gone."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Until the process has ended; returns its exit code."""
        try:
            return self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Child(Command):
    """`python -m benchmarks.<module> <json>`."""

    def __init__(
        self, module: str, options: object = None, *, environ: Mapping[str, str] | None = None
    ) -> None:
        argument = msgspec.json.encode(options).decode()
        super().__init__([sys.executable, "-m", f"benchmarks.{module}", argument], environ=environ)


def answer(module: str, options: object = None) -> Any:
    """Runs a client to its end; returns the one line that it prints."""
    with Child(module, options) as child:
        found = child.read()
        child.wait()
    return found


class Running(msgspec.Struct, frozen=True):
    """A server and its address."""

    url: str
    child: Command


@contextmanager
def contextd_alone() -> Iterator[Running]:
    """contextd on a new database."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_contextd(Path(folder) / "contextd.db") as contextd,
    ):
        yield Running(contextd.read_url(), contextd)


@contextmanager
def both_servers(bare_module: str) -> Iterator[tuple[Running, Running]]:
    """contextd on a new database and a server that is no contextd, started at the same time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_contextd(Path(folder) / "contextd.db") as contextd,
        Child(bare_module) as bare,
    ):
        yield Running(contextd.read_url(), contextd), Running(bare.read_url(), bare)


def start_contextd(database: Path) -> Child:
    """contextd with the provider of paced.py; it listens once `read_url` returns."""
    environ = {
        "CONTEXTD_DATABASE": f"sqlite+aiosqlite:///{database}",
        "CONTEXTD_PORT": "0",
        "CONTEXTD_LOG_LEVEL": "warning",
    }
    return Child("paced", environ=environ)


def raise_file_limit() -> None:
    """As many open files as this process may have: a stream takes one on either side."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _environ() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CONTEXTD_")}
    paths = [str(TESTS), str(TESTS.parent), inherited.get("PYTHONPATH", "")]
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
