"""One server or several on one database, which can be killed, frozen and started again."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence

from evidence import Evidence
from serving import Server

# What a server may say for itself at the level of warnings. A defect is logged as an error.
DEFECTS = ("Traceback", "[error", "[critical", '"level":"error"')

SETTINGS: Mapping[str, object] = {
    "backoff_initial_s": 0.05,
    "backoff_max_s": 0.3,
    "scripted_rate": 100,
}
LEASE_S = 1.0  # of several servers: what one was doing when it was killed is soon taken over


class Fleet:
    """Servers by number. A number that is not in `ports` is down.

    `url_of` names the database for each of them, where they do not name it alike. A line of a log that
    has one of `expected` is no defect.
    """

    def __init__(
        self,
        url: str,
        *,
        size: int,
        settings: Mapping[str, object],
        evidence: Evidence,
        url_of: Callable[[int], str] | None = None,
        expected: Sequence[str] = (),
    ) -> None:
        self._url_of = url_of or (lambda _: url)
        self._expected = expected
        self._settings = {**SETTINGS, **settings}
        self._servers: dict[int, Server] = {}
        self._evidence = evidence
        self._asked = 0
        self.size = size
        self.ports: dict[int, int] = {}
        self.up = asyncio.Event()

    def port(self) -> int | None:
        """Of the servers that are up each in its turn; None while there is none."""
        if not self.ports:
            return None
        self._asked += 1
        ports = [*self.ports.values()]
        return ports[self._asked % len(ports)]

    async def start(self, number: int) -> None:
        """Returns when it accepts connections."""
        server = self._servers[number] = Server(self._url_of(number), settings=self._settings)
        await asyncio.to_thread(server.start)
        self.ports[number] = server.port
        self.up.set()

    async def start_and_kill(self, number: int, after_s: float) -> bool:
        """A server that dies while it starts, or just after; says whether it had come up."""
        server = self._servers[number] = Server(self._url_of(number), settings=self._settings)
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        done, _ = await asyncio.wait([starting], timeout=after_s)
        await self._kill(number)
        outcomes = await asyncio.gather(starting, return_exceptions=True)
        if done and isinstance(outcomes[0], BaseException):
            self._evidence.fault("a server that did not start", log=server.log[-2000:])
        return bool(done)

    async def kill(self, number: int) -> None:
        """SIGKILL."""
        self._down(number)
        await self._kill(number)

    def freeze(self, number: int) -> None:
        """The process stands still, as on a machine that swaps or is moved."""
        os.kill(self._servers[number].pid, signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        """It goes on as if nothing had been."""
        os.kill(self._servers[number].pid, signal.SIGCONT)

    async def stop(self) -> list[int]:
        """SIGTERM for all; their exit codes."""
        numbers = [*self.ports]
        for number in numbers:
            self._down(number)
        stopping = [asyncio.to_thread(self._servers[number].stop) for number in numbers]
        codes = await asyncio.gather(*stopping)
        for number in numbers:
            self._look_at_log(number)
        return codes

    async def abandon(self) -> None:
        """Whatever still runs is ended, also after a failure."""
        for number, server in self._servers.items():
            self._down(number)
            await asyncio.to_thread(server.kill)

    def _down(self, number: int) -> None:
        self.ports.pop(number, None)
        if not self.ports:
            self.up.clear()

    async def _kill(self, number: int) -> None:
        await asyncio.to_thread(self._servers[number].kill)
        self._look_at_log(number)

    def _look_at_log(self, number: int) -> None:
        lines = self._servers[number].log.splitlines(keepends=True)
        for at, line in enumerate(lines):
            is_expected = any(words in line for words in self._expected)
            if any(word in line for word in DEFECTS) and not is_expected:
                log = "".join(lines[max(0, at - 3) : at + 40])
                self._evidence.fault("a defect in the server's log", log=log[:3000])
                return
