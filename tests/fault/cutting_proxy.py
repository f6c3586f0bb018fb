"""A TCP proxy on loopback that cuts connections at seeded random bytes, and otherwise behaves badly.

Each connection draws a plan from the seed and its own number: after how many bytes of which direction
it is cut, or at which mark (inside a signal, a header, a character of several bytes), how (both ways
at once with a reset, an orderly close, or one way first), whether it stalls before, and in pieces of
what size it delivers until then. What runs between the cuts depends on the machine; the plans do not.
"""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from raw_http import HOST

RELAY_BYTES = 65_536
STALL_S_MAX = 0.8
HALF_S_MAX = 1.0

# Where a cut hurts most: between a head and its body, inside a signal, an id, a member of a body, and
# inside the bytes of one character. The cut falls on some byte of the mark or right behind it.
BODY_MARKS = (
    b"HTTP/1.1 200",
    b"\r\n\r\n",
    b"content-length: ",
    b"contextd-sequence",
    b'"content":"',
    b'"sequence":',
    b'"final":',
    "🙂".encode(),
    "👩‍👩‍👧‍👦".encode(),
    "\u2028".encode(),
    b"\\\\",
    b"\\u",
)
STREAM_MARKS = (
    b"\r\n\r\n",
    b"\n\n",
    b"id: ",
    b"data: {",
    b'"message_completed"',
    b'"current_sequence":',
    b'"new_state":',
    b'"heartbeat"',
)


@dataclass(frozen=True)
class Plan:
    """What happens to one connection."""

    cut: bool
    upward: bool  # the bytes that count are the client's
    after_bytes: int
    mark: bytes | None
    mark_count: int
    mark_offset: int
    stall_s: float
    how: str  # reset | close | half_down | half_up
    half_s: float
    piece_bytes: int  # 0: as it comes


def make_plan(random: Random, cut_share: float, marks: Sequence[bytes]) -> Plan:
    """One connection's fate."""
    mark = random.choice(marks) if random.random() < 0.4 else None
    span = random.choice((40, 300, 1500, 6000, 20_000))
    return Plan(
        cut=random.random() < cut_share,
        upward=random.random() < 0.15,
        after_bytes=random.randrange(span),
        mark=mark,
        mark_count=random.choice((1, 1, 2, 3, 8, 20)),
        mark_offset=random.randint(0, len(mark)) if mark else 0,
        stall_s=random.uniform(0, STALL_S_MAX) if random.random() < 0.1 else 0.0,
        how=random.choice(("reset", "reset", "close", "close", "half_down", "half_up")),
        half_s=random.uniform(0, HALF_S_MAX),
        piece_bytes=random.choice((0, 0, 0, 0, 1, 3, 7, 64)),
    )


class Fuse:
    """Counts the bytes of one direction and says where the cut falls."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._passed = 0
        self._tail = b""
        self._found = 0

    def burn(self, data: bytes) -> int | None:
        """How many bytes of `data` still pass before the cut; None: all of it."""
        place = self._find_mark(data) if self._plan.mark else self._plan.after_bytes - self._passed
        self._passed += len(data)
        return place if place is not None and place < len(data) else None

    def _find_mark(self, data: bytes) -> int | None:
        mark = self._plan.mark
        assert mark is not None
        window = self._tail + data
        start = 0
        while (at := window.find(mark, start)) >= 0:
            self._found += 1
            start = at + len(mark)
            if self._found == self._plan.mark_count:
                return max(0, at + self._plan.mark_offset - len(self._tail))
        self._tail = window[max(start, len(window) - len(mark) + 1) :]
        return None


class CuttingProxy:
    """Relays to the port that `target` names for each connection; None refuses it.

    `cut_share` of the connections have a plan to be cut. `calm` ends that for good.
    """

    def __init__(
        self,
        target: Callable[[], int | None],
        *,
        seed: str,
        cut_share: float,
        marks: Sequence[bytes] = BODY_MARKS,
    ) -> None:
        self._target = target
        self._marks = marks
        self._seed = seed
        self._cut_share = cut_share
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._calm = False
        self.cuts: Counter[str] = Counter()
        self.connections = 0
        self.port = 0
        self.on_cut: Callable[[], None] = lambda: None

    @property
    def cut_count(self) -> int:
        """How many connections were cut while both ends were there."""
        return sum(self.cuts.values())

    async def start(self) -> None:
        """Listens on a free port of loopback."""
        self._server = await asyncio.start_server(self._accept, HOST, 0, limit=RELAY_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def calm(self) -> None:
        """From now on nothing is cut any more."""
        self._calm = True

    def plan_next(self) -> Plan:
        """Of the connection that was accepted last."""
        share = 0.0 if self._calm else self._cut_share
        return make_plan(Random(f"{self._seed}:{self.connections}"), share, self._marks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        with suppress(asyncio.CancelledError):
            await self._relay(self.plan_next(), reader, writer)

    async def _relay(
        self, plan: Plan, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        port = self._target()
        upstream: asyncio.StreamWriter | None = None
        try:
            if port is None:
                return
            answers, upstream = await asyncio.open_connection(HOST, port, limit=RELAY_BYTES)
            link = _Link(self, plan, writer, upstream)
            async with asyncio.TaskGroup() as group:
                group.create_task(link.pump(reader, upstream, upward=True))
                group.create_task(link.pump(answers, writer, upward=False))
        except* (OSError, EOFError, _CutError):
            pass
        finally:
            for side in (writer, upstream):
                if side is not None:
                    side.close()  # what was delivered still arrives

    def count(self, kind: str) -> None:
        """One more cut."""
        self.cuts[kind] += 1
        self.on_cut()

    @property
    def is_calm(self) -> bool:
        """Whether cutting has ended."""
        return self._calm


class _CutError(Exception):
    """Ends both pumps of a connection."""


class _Link:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: CuttingProxy,
        plan: Plan,
        down: asyncio.StreamWriter,
        up: asyncio.StreamWriter,
    ) -> None:
        self._proxy = proxy
        self._plan = plan
        self._down = down
        self._up = up
        self._fuse = Fuse(plan)
        self._answered = b""  # the beginning of the newest answer, to tell what was cut
        self._halved = False

    async def pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        """Relays one direction until it ends or the fuse has burnt."""
        counts = self._plan.cut and self._plan.upward == upward
        try:
            while data := await source.read(RELAY_BYTES):
                passing = self._fuse.burn(data) if counts else None
                if self._proxy.is_calm:
                    passing = None
                self._note(data[:passing], upward=upward)
                await self._deliver(sink, data[:passing])
                if passing is not None:
                    await self._cut(upward=upward)
        except OSError:
            if not self._halved:
                raise
        if self._halved:  # the other side does not hear of it yet
            await asyncio.sleep(self._plan.half_s)
        raise EOFError

    def _note(self, data: bytes, *, upward: bool) -> None:
        if upward:
            self._answered = b""
        elif len(self._answered) < 1024:
            self._answered += data[:1024]

    async def _deliver(self, sink: asyncio.StreamWriter, data: bytes) -> None:
        size = self._plan.piece_bytes or len(data) or 1
        # A long text in single bytes would only measure patience: the rest goes in one piece.
        fine = data[: size * 400]
        for start in range(0, len(fine), size):
            sink.write(fine[start : start + size])
            await sink.drain()
            if self._plan.piece_bytes:
                await asyncio.sleep(0)
        if len(data) > len(fine):
            sink.write(data[len(fine) :])
            await sink.drain()

    async def _cut(self, *, upward: bool) -> None:
        plan = self._plan
        if plan.stall_s:
            await asyncio.sleep(plan.stall_s)
        self._proxy.count(f"{self._where(upward=upward)}/{plan.how}")
        match plan.how:
            case "reset":
                for side in (self._down, self._up):
                    _linger_zero(side)
            case "close":
                for side in (self._down, self._up):
                    side.close()
            case "half_down" | "half_up":
                self._halved = True
                (self._down if plan.how == "half_down" else self._up).close()
                await asyncio.sleep(plan.half_s)
        raise _CutError

    def _where(self, *, upward: bool) -> str:
        if upward:
            return "request"
        if b"\r\n\r\n" not in self._answered:
            return "head"
        return "stream" if b"text/event-stream" in self._answered else "body"


def _linger_zero(writer: asyncio.StreamWriter) -> None:
    """Closing sends a reset, as a connection does that was lost and not ended."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
