"""A real `contextd serve` in a process of its own, for tests, fault runs and benchmarks.

`Server` starts it on a free loopback port, waits until it says that it listens, and ends it: cleanly,
or with SIGKILL as a crash would. The database outlives it, so a test can start another on the same.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

START_S = 90  # a hang, not a measure
STOP_S = 15
MARKER = "listens on "


class Process(Protocol):
    """What is used of `subprocess.Popen` here."""

    pid: int
    stdout: IO[str] | None
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


def spawn(arguments: Sequence[str], env: Mapping[str, str]) -> Process:
    """Starts `python -m contextd` with these arguments; its output comes through pipes."""
    command = [sys.executable, "-m", "contextd", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


class Server:
    """One server process. `settings` are CONTEXTD_* names in lower case without the prefix."""

    spawn: Callable[[Sequence[str], Mapping[str, str]], Process] = staticmethod(spawn)

    def __init__(
        self,
        database: str | Path,
        *,
        settings: Mapping[str, object] | None = None,
        port: int = 0,
    ) -> None:
        url = database if isinstance(database, str) else f"sqlite+aiosqlite:///{database}"
        self._settings = {"database": url, "port": port, "log_level": "warning", **(settings or {})}
        self._process: Process | None = None
        self._log: list[str] = []
        self._reading: threading.Thread | None = None
        self.url = ""

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def port(self) -> int:
        """On which it listens."""
        return int(self.url.rsplit(":", 1)[1])

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return "".join(self._log)

    def start(self) -> "Server":
        """Returns when the server accepts connections."""
        environ = {k: v for k, v in os.environ.items() if not k.startswith("CONTEXTD_")}
        for name, value in self._settings.items():
            environ[f"CONTEXTD_{name.upper()}"] = str(value)
        self._process = Server.spawn(["serve"], environ)
        self._reading = threading.Thread(target=self._read_log, daemon=True)
        self._reading.start()
        watchdog = threading.Timer(START_S, self._process.kill)
        watchdog.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if MARKER in line:
                    self.url = line.split(MARKER, 1)[1].split()[0]
                    return self
        finally:
            watchdog.cancel()
        self.wait()
        raise AssertionError(f"contextd did not start: {self.log}")

    def kill(self) -> None:
        """A crash: SIGKILL, and the process is gone when this returns."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """A clean stop; returns the exit code."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Until the process has ended; returns its exit code."""
        assert self._process is not None
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"contextd did not stop within {STOP_S} s: {self.log}") from None
        if self._reading is not None:
            self._reading.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()

    def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log.append(line)
        self._process.stderr.close()
