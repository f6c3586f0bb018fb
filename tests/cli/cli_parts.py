"""What tests of the command line are made of: the fake in a thread, a run, a screen."""

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "client"))

from fake_contextd import FakeContextd, serving

__all__ = ["Ran", "Screen", "Served", "serving"]


class Served(FakeContextd):
    """The fake with its loop, so that a test in another thread can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def do(self, change: Callable[[], object]) -> None:
        """Runs `change` on the server's loop, and waits for it."""

        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self.loop).result(5)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits for `condition`, which is looked at after each request."""
        asyncio.run_coroutine_threadsafe(self.until(condition), self.loop).result(5)


@dataclass
class Ran:
    code: int
    out: bytes
    err: str


class Screen:
    """A process on a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, env=environment, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.seen = b""

    def read_until(self, part: bytes) -> None:
        while part not in self.seen and self._read():
            pass
        assert part in self.seen

    def read_to_end(self) -> str:
        """All that was shown, after the process has ended."""
        while self._read():
            pass
        os.close(self._master)
        self.process.wait(10)
        return self.seen.decode()

    def _read(self) -> bool:
        try:
            part = os.read(self._master, 4096)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.seen += part
        return bool(part)
