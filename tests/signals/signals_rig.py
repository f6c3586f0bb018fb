"""A hub whose clock stands still, and readers that are driven by hand."""

from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from contextd.core.signal import ContentDelta, Heartbeat, MessageCompleted, Signal, StateChanged
from contextd.signals import Closing, Head, Hub, Reader, Standing

CONTEXT = "talk"
WALL_MS = 1_780_000_000_000
TICK = 2**-7  # seconds; a power of two, so that sums of ticks are exact
START = 1024.0

_decode = msgspec.json.Decoder(Signal).decode


@dataclass(frozen=True)
class Event:
    """One block of lines of an event stream."""

    id: int | None = None
    name: str | None = None
    signal: Any = None
    retry_ms: int | None = None

    @property
    def brief(self) -> tuple[Any, ...]:
        """The event without what all tests know: (what, where, how far), and the id if it has one."""
        match self.signal:
            case ContentDelta():
                told: tuple[Any, ...] = (
                    "delta",
                    self.signal.message_id,
                    self.signal.current_sequence,
                )
            case MessageCompleted():
                told = ("completed", self.signal.message_id, self.signal.final_sequence)
            case StateChanged():
                told = ("state", self.signal.new_state, self.signal.revision)
            case Heartbeat():
                told = ("heartbeat",)
            case _:
                told = ("retry",)
        return told if self.id is None else (*told, f"id {self.id}")


def parse(block: bytes) -> list[Event]:
    """The events of a block; it must consist of whole events."""
    assert block.endswith(b"\n\n")
    return [_event(text) for text in block.decode().removesuffix("\n\n").split("\n\n")]


def _event(text: str) -> Event:
    lines = dict(line.split(": ", 1) for line in text.split("\n"))
    assert len(lines) == text.count("\n") + 1
    assert lines.keys() <= {"id", "event", "data", "retry"}
    return Event(
        id=int(lines["id"].removeprefix("base-")) if "id" in lines else None,
        name=lines.get("event"),
        signal=_decode(lines["data"].encode()) if "data" in lines else None,
        retry_ms=int(lines["retry"]) if "retry" in lines else None,
    )


def briefs(block: bytes | None) -> list[tuple[Any, ...]]:
    """The events of a block in short; none for no block."""
    return [] if block is None else [event.brief for event in parse(block)]


class Stepped:
    """A coroutine that waits on futures of the hub, run by hand: only as far as it can go now."""

    def __init__(self, coroutine: Coroutine[Any, None, Any]) -> None:
        self._coroutine = coroutine
        self._future: Any = None
        self.steps = 0
        self.done = False
        self.result: Any = None

    @property
    def waits(self) -> bool:
        """It waits for something that has not come."""
        return self._future is not None and not self._future.done()

    def step(self) -> bool:
        """Go on if possible; whether it has returned."""
        if self.done or self.waits:
            return self.done
        self.steps += 1
        try:
            self._future = self._coroutine.send(None)
            self._future._asyncio_future_blocking = False  # what a task does when it takes it over
        except StopIteration as end:
            self.done, self.result = True, end.value
        return self.done


class Tap:
    """The one who takes a reader's blocks, and takes nothing unless told to."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ended = False
        self.stuck = 0
        self._taking: Stepped | None = None
        reader.on_stuck = self._count_stuck

    @property
    def asleep(self) -> bool:
        """It has come for a block, and nothing has woken it."""
        return self._taking is not None and self._taking.waits

    def take(self) -> bytes | None:
        """A block if one is due now, else None; afterwards the reader waits for the next one."""
        if self._taking is None:
            self._taking = Stepped(self.reader.take())
        if not self._taking.step():
            return None
        block: bytes | None = self._taking.result
        self._taking = None
        self.ended = block is None
        return block

    def told(self) -> list[tuple[Any, ...]]:
        """What is due now, in short."""
        return briefs(self.take())

    def drain(self) -> Iterator[bytes]:
        """Blocks for as long as one is due."""
        while (block := self.take()) is not None:
            yield block

    def _count_stuck(self) -> None:
        self.stuck += 1


class Rig:
    """A hub with a clock that moves when it is told to."""

    def __init__(self, **options: Any) -> None:
        self.now = START
        self.gaps: list[str] = []
        self.hub = Hub(
            database_id="base",
            tick_s=TICK,
            clock=lambda: self.now,
            now_ms=lambda: WALL_MS + round((self.now - START) * 1000),
            **options,
        )
        self.hub.on_gap = self.gaps.append

    def pass_ticks(self, ticks: float) -> None:
        """Let the clock move on, and ring what is due."""
        self.now += ticks * TICK
        self.hub.advance()

    def attach(
        self,
        *,
        throttle: int = 16,
        heartbeat: int = 2000,
        named: bool = False,
        revision: int = 10,
        open_heads: tuple[Head, ...] = (),
    ) -> Tap:
        """A live reader, attached at `revision`; what it was sent to begin with is gone.

        Throttle and heartbeat are in ticks.
        """
        reader = self.hub.subscribe(
            CONTEXT, throttle_s=throttle * TICK, heartbeat_s=heartbeat * TICK, named=named
        )
        reader.snapshot(changes=(), open_heads=open_heads, standing=standing(revision))
        return Tap(reader)

    def head(self, message_id: str, position: int, opened_revision: int = 11) -> None:
        """Publish a position."""
        self.hub.publish_head(head(message_id, position, opened_revision))

    def change(self, revision: int, *closings: Closing, state: str = "busy") -> None:
        """Publish a change."""
        self.hub.publish(revision=revision, closings=closings, standing=standing(revision, state))


def head(message_id: str, position: int, opened_revision: int = 11) -> Head:
    """A head of an assistant's message."""
    return Head(
        context_id=CONTEXT,
        message_id=message_id,
        role="assistant",
        kind="text",
        position=position,
        opened_revision=opened_revision,
    )


def closing(message_id: str, final: int, revision: int, role: str = "assistant") -> Closing:
    """A message's end."""
    return Closing(
        context_id=CONTEXT,
        message_id=message_id,
        role=role,
        kind="text",
        final=final,
        status="completed",
        revision=revision,
    )


def standing(revision: int, state: str = "busy") -> Standing:
    """A context's state."""
    return Standing(context_id=CONTEXT, state=state, revision=revision, record_revision=revision)
