"""Writes one produced message as §7 says, through cuts, take-overs and restarts of either side.

It is in one of five steps at any time. A request that was not answered leads to `recover`, a refusal
because somebody else has taken over to `lose`, and both of them back to `write_on`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from producer_ledger import now_ms
from producer_link import USAGE, ClosedError, MessageLink, StaleError
from producer_mischief import try_what_is_forbidden
from raw_http import Answer, BrokenError

PATIENCE_S = 60.0  # without any progress while there is a server, through turns of its own
RETRY_S_MAX = 0.1
REPEATS_MAX = 5
LENGTHS_MAX = {"single": 1, "batch": 20, "ndjson": 80}

Step = Callable[[], Awaitable[None]]


class LostError(Exception):
    """The message is somebody else's, and is left to them."""


class MessageWriter:
    """Used once in a process; the next one goes on from the ledger."""

    def __init__(self, link: MessageLink) -> None:
        self._link = link
        self._plan = link.plan
        self._message = link.message
        self._random = link.random
        self._standing = link.standing
        self._record = link.record
        self._take_backs = link.plan.take_backs
        self._taking_back = False
        self._done = False
        self._deadline = 0.0

    async def run(self) -> None:
        """Returns when it is closed, lost, or left on purpose."""
        self._note_progress()
        step: Step = self._take_over
        try:
            while not self._done:
                step = await self._go(step)
        except ClosedError:
            self._link.count("producers told of an end")
        except LostError:
            self._link.note("stale")
        finally:
            self._link.wire.hang_up()

    async def _go(self, step: Step) -> Step:
        """Does one step and says which is next."""
        try:
            await step()
        except StaleError as error:
            return partial(self._lose, error.epoch)
        except BrokenError:
            self._standing.in_doubt = True
            self._link.count("broken requests of producers")
            if self._link.wire.direct_port() is None:
                self._note_progress()  # nobody can go on without a server
            if asyncio.get_running_loop().time() > self._deadline:
                self._link.accuse("a producer that cannot go on")
            await asyncio.sleep(self._random.uniform(0, RETRY_S_MAX))
            return self._recover if step == self._write_on else step
        if not self._done:  # whoever had it before may write meanwhile, if it is let
            await asyncio.sleep(self._random.uniform(0, self._plan.pause_s))
        return self._write_on

    def _note_progress(self) -> None:
        self._deadline = asyncio.get_running_loop().time() + PATIENCE_S

    async def _write_on(self) -> None:
        message = self._message
        while self._standing.head < message.chunks:
            if self._random.random() < self._plan.mischief_share:
                await try_what_is_forbidden(self._link)
            await self._write_some()
            if self._done:
                return
            if message.pace_s:
                await asyncio.sleep(self._random.uniform(0, message.pace_s))
        if message.ending != "leave":
            await self._end()
        self._done = True

    # The epoch.

    async def _take_over(self) -> None:
        """With the next epoch of this producer, or the one whose answer was lost, or none at all."""
        intended = self._record.intended
        unanswered = intended > 0 and intended not in self._record.opened
        epoch: int | None = intended + 1
        if unanswered and self._random.random() < 0.5:
            epoch = intended
        elif self._message.fenced and self._random.random() < 0.3:
            epoch = None
        await self._open(epoch)

    async def _open(self, epoch: int | None) -> None:
        producer: dict[str, Any] = {"id": self._plan.name}
        if epoch is not None:
            producer["epoch"] = epoch
            self._link.note("intended", epoch=epoch)
            self._record.intended = max(self._record.intended, epoch)
        asked_at_ms = now_ms()
        answer = await self._put({"producer": producer, "metadata": {"ending": "planned"}})
        if answer.status not in (200, 201):
            self._link.refused("PUT", answer)
        self._take_opened(answer, epoch, asked_at_ms)

    async def _put(self, body: dict[str, Any]) -> Answer:
        """Until no turn of the server's own is in the way."""
        while True:
            answer = await self._link.wire.ask("PUT", self._link.path, body)
            if (answer.status, answer.code) != (409, "context_busy"):
                return answer
            self._link.count("openings that waited for a turn")
            if asyncio.get_running_loop().time() > self._deadline:
                self._link.accuse("a turn that does not end")
            await asyncio.sleep(self._random.uniform(RETRY_S_MAX, 4 * RETRY_S_MAX))

    def _take_opened(self, answer: Answer, asked: int | None, asked_at_ms: float) -> None:
        told, standing = answer.json(), self._standing
        epoch, head = told.get("epoch"), told["current_sequence"]
        if asked not in (None, epoch) or told["status"] != "streaming":
            self._link.wrong("an opened message that is not as asked", answer)
        if answer.status == 201 and (head or not answer.headers.get("location")):
            self._link.wrong("a new message that is not new", answer)
        if head < self._record.acked:
            self._link.wrong("acknowledged chunks that are lost", answer)
        self._link.note("opened", epoch=epoch, head=head, asked_at_ms=asked_at_ms)
        fresh = epoch not in self._record.opened
        self._record.opened.setdefault(epoch, head)
        self._record.intended = max(self._record.intended, epoch)
        if fresh and self._message.fenced:
            standing.base, standing.in_doubt = head, False
        standing.epoch, standing.head = epoch, head
        self._note_progress()

    async def _lose(self, epoch: int) -> None:
        """Another one has the message: the old epoch is refused, however it is tried."""
        if not self._taking_back:
            if self._standing.epoch in self._record.opened:
                await self._try_in_vain(epoch)
                self._link.count("producers that were stale")
            if self._take_backs == 0:
                raise LostError
            self._take_backs -= 1
            self._taking_back = True
            self._link.count("take-backs")
            await asyncio.sleep(self._random.uniform(0, self._plan.pause_s))
        self._record.intended = max(self._record.intended, epoch)
        await self._take_over()
        self._taking_back = False

    async def _try_in_vain(self, epoch: int) -> None:
        attempts: list[Step] = [self._append_in_vain] * self._random.randint(1, 3)
        attempts.append(partial(self._open, self._standing.epoch))
        for attempt in attempts:
            try:
                await attempt()
            except StaleError as error:
                if error.epoch < epoch:
                    self._link.accuse("an epoch that goes back", was=epoch, now=error.epoch)
                epoch = max(epoch, error.epoch)
            else:
                self._link.accuse("an old epoch that was let in", told=epoch)

    async def _append_in_vain(self) -> None:
        """Of these chunks nothing is noted: if one is stored, nobody wrote it."""
        way, first, last = self._choose()
        first = min(first, last)
        answer = await self._link.send(way, self._chunks(first, last), ends=False)
        if answer.status != 200:
            self._link.refused(f"chunks of an old epoch, {way}", answer)

    # After a break.

    async def _recover(self) -> None:
        """Finds out where to go on after a request that was not answered."""
        choice = self._random.choice(("again", "ask", "repeat", "take over"))
        if not self._message.numbered:
            choice = "take over"  # what is on its way must not arrive any more
        match choice:
            case "ask":
                await self._ask_head()
            case "repeat":
                await self._open(self._standing.epoch)
            case "take over":
                await self._take_over_from_self()
            case _:
                pass  # the same chunks once more: those that are stored count as duplicates
        self._link.count(f"recoveries, {choice}")

    async def _take_over_from_self(self) -> None:
        await self._take_over()
        told = await self._link.look()
        if self._message.fenced and told["current_sequence"] != self._standing.head:
            self._link.accuse("a fenced head that moved", now=told["current_sequence"])

    async def _ask_head(self) -> None:
        """`GET` of the message tells where to go on (§7)."""
        standing = self._standing
        head = (await self._link.look())["current_sequence"]
        # After a take-over, and before its first chunk, others have sent what is above `sent`.
        if not standing.head <= head <= max(standing.sent, standing.base):
            self._link.accuse("a head that cannot be", now=head)
        standing.head = head

    # The text.

    async def _write_some(self) -> None:
        """Some chunks, acknowledged when this returns; perhaps the message is completed with them."""
        way, first, last = self._choose()
        message = self._message
        ends = way == "ndjson" and message.ending == "line" and last == message.chunks
        self._link.note_sending(last)
        if ends:
            self._link.note("ending", status="completed")
        asked_at_ms = now_ms()
        chunks = self._chunks(first, last)
        answer = await self._link.send(way, chunks, ends=ends)
        if answer.status != 200:
            self._link.refused(f"chunks, {way}", answer)
        self._take_acked(answer, first, last, asked_at_ms)
        self._link.count(f"appends, {way}")
        if self._plan.planted == "repeat" and not message.numbered:
            await self._link.send(way, chunks, ends=False)
        if ends:
            self._link.note_closed("completed", message.chunks)
            self._done = True

    def _choose(self) -> tuple[str, int, int]:
        """A way, and from which chunk to which."""
        way = self._random.choice(self._message.ways)
        first = self._standing.head + 1
        if self._message.numbered and self._random.random() < 0.15:  # some once more
            first = max(self._standing.base + 1, first - self._random.randint(0, REPEATS_MAX))
        last = first + self._random.randrange(LENGTHS_MAX[way])
        return way, first, min(self._message.chunks, last)

    def _chunks(self, first: int, last: int) -> list[dict[str, Any]]:
        return [self._link.chunk(place) for place in range(first, last + 1)]

    def _take_acked(self, answer: Answer, first: int, last: int, asked_at_ms: float) -> None:
        told, standing = answer.json(), self._standing
        fits = (
            set(told) == {"message_id", "sequence", "accepted", "duplicates"}
            and told["message_id"] == self._message.id
            and told["accepted"] + told["duplicates"] == last - first + 1
            and last <= told["sequence"] <= standing.sent
            and (self._message.numbered or (told["sequence"], told["duplicates"]) == (last, 0))
        )
        if not fits:
            self._link.wrong(f"an append of {first} to {last} that is answered otherwise", answer)
        standing.head = max(standing.head, last)
        accepted = told["accepted"]
        self._link.note_acked(first, last, accepted=accepted, asked_at_ms=asked_at_ms)
        self._link.count("duplicates", told["duplicates"])
        self._note_progress()

    # The end.

    async def _end(self) -> None:
        """`complete` or `fail`; a repeat of `complete` answers the same."""
        message, failing = self._message, self._message.ending == "fail"
        status = "failed" if failing else "completed"
        self._link.note("ending", status=status)
        body: dict[str, Any] = {**self._link.fence}
        if failing:
            body["error"] = {"type": "gave_up", "message": "as planned"}
        elif self._random.random() < 0.7:
            body |= {"final_sequence": message.chunks, "finish_reason": "stop", "usage": USAGE}
        target = f"{self._link.path}/{'fail' if failing else 'complete'}"
        for _ in range(1 + (not failing and self._random.random() < 0.2)):
            answer = await self._link.wire.ask("POST", target, body)
            if answer.status != 200:
                self._link.refused("the end", answer)
            told = answer.json()
            if (told["status"], told["final_sequence"]) != (status, message.chunks):
                self._link.wrong("another end", answer)
        self._link.note_closed(status, message.chunks)
