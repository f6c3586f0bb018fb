"""One message as its producer asks for it, and what the answers of §7 mean to it.

Each refusal that §7 allows becomes an error of its own here; whatever else comes is written down as a
fault of the server.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, NoReturn

from producer_ledger import Account, Ledger
from producer_plan import UNFENCED, Author, MessagePlan, ProducerPlan
from producer_wire import Wire
from raw_http import Answer, BrokenError

USAGE = {"prompt_tokens": 3, "completion_tokens": 7}


class ClosedError(Exception):
    """The message is closed: nothing more can be written to it."""


class StaleError(Exception):
    """Somebody else has taken over, in this epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch


class GoneError(Exception):
    """The context was deleted."""


class WrongError(Exception):
    """An answer that cannot be gone on from; it is in the ledger."""


@dataclass
class Standing:
    """How far a producer has got. `base`: the head when its epoch began: what is below may be another's.

    `in_doubt`: a request of this epoch may still be on its way.
    """

    epoch: int
    base: int
    head: int
    sent: int
    in_doubt: bool = False


class MessageLink:
    """Requests about one message. `standing` and `record` are kept up by its writer and by refusals."""

    def __init__(
        self,
        plan: ProducerPlan,
        message: MessagePlan,
        account: Account,
        ledger: Ledger,
        random: Random,
    ) -> None:
        self.plan = plan
        self.message = message
        self.record = account.record(message.id)
        self.random = random
        self.path = f"/contexts/{plan.context_id}/messages/{message.id}"
        self.wire = Wire(plan.port, plan.port_file, random)
        sent = max(self.record.sent.values(), default=0)
        self.standing = Standing(
            epoch=self.record.intended, base=0, head=self.record.acked, sent=sent
        )
        self._ledger = ledger
        self._author = Author(plan.seed, message.id)

    # What is written.

    @property
    def text_epoch(self) -> int:
        """What the texts of this producer are marked with."""
        return self.standing.epoch if self.message.fenced else UNFENCED

    @property
    def fence(self) -> dict[str, int]:
        """The member of a request that fences it."""
        return {"epoch": self.standing.epoch} if self.message.fenced else {}

    def chunk(self, sequence: int) -> dict[str, Any]:
        """The chunk that belongs there."""
        chunk: dict[str, Any] = {"content": self._author.text(self.text_epoch, sequence)}
        if self.message.numbered:
            chunk["sequence"] = sequence
        return chunk

    # The ledger.

    def note(self, what: str, **facts: Any) -> None:
        """A line about this message."""
        self._ledger.note(what, message=self.message.id, **facts)

    def count(self, name: str, number: int = 1) -> None:
        """For the figures of the run."""
        self._ledger.count(name, number)

    def note_sending(self, last: int) -> None:
        """Chunks up to `last` may be stored from here on."""
        self.standing.sent = max(self.standing.sent, last)
        self.note("sending", epoch=self.text_epoch, sequence=last)

    def note_acked(self, first: int, last: int, *, accepted: int, asked_at_ms: float) -> None:
        """These chunks are durable, from here on and for ever."""
        self.record.acked = max(self.record.acked, last)
        self.note(
            "acked",
            epoch=self.text_epoch,
            first=first,
            last=last,
            accepted=accepted,
            asked_at_ms=asked_at_ms,
        )
        self.count("chunks acknowledged", accepted)

    def take_end(self, status: str, final: int) -> None:
        """An end that was told; what was acknowledged is in it."""
        if final < self.record.acked:
            self.accuse("an end below what was acknowledged", status=status, final=final)
        self.note_closed(status, final)

    def note_closed(self, status: str, final: int) -> None:
        """The end as it was told."""
        self.record.closed = status, final
        self.note("closed", status=status, final=final)

    # Requests.

    async def look(self) -> dict[str, Any]:
        """The message, which is open. Raises `ClosedError`, or `StaleError` when it is another's."""
        answer = await self.wire.ask("GET", self.path)
        if answer.status != 200:
            self.refused("GET", answer)
        told: dict[str, Any] = answer.json()
        if told["status"] != "streaming":
            self._hear_of_end(told["status"], told["final_sequence"])
        if self.message.fenced and told["epoch"] != self.standing.epoch:
            raise StaleError(told["epoch"])
        return told

    async def send(self, way: str, chunks: list[dict[str, Any]], *, ends: bool) -> Answer:
        """An append. `ends`: with its last line, which completes the message."""
        target = f"{self.path}/chunks"
        if way == "single" and len(chunks) == 1:
            return await self.wire.ask("POST", target, {**self.fence, **chunks[0]})
        if way != "ndjson":
            return await self.wire.ask("POST", target, {**self.fence, "chunks": chunks})
        lines = [self.fence, *chunks] if self.fence else chunks
        if ends:
            lines = [*lines, {"complete": {"finish_reason": "stop", "usage": USAGE}}]
        answer = await self.wire.stream(target, lines, self.message.pace_s)
        if answer.status in (400, 409):
            self._require_line(answer, len(lines))
        return answer

    # Answers.

    def refused(self, what: str, answer: Answer) -> NoReturn:
        """Raises what the refusal means; accuses when it means nothing good."""
        told = answer.json() if answer.body else {}
        match answer.status, answer.code:
            case (409, "stale_producer"):
                if told["epoch"] < self.standing.epoch:
                    self.wrong("stale, and yet newer", answer)
                raise StaleError(told["epoch"])
            case (409, "message_closed"):
                self._hear_of_end(told["message_status"], told["final_sequence"])
            case (404, "context_not_found"):
                raise GoneError
            case (429 | 503, _):
                self.count("busy answers")
                raise BrokenError("busy")
            case _:
                self.wrong(f"an answer to {what}", answer)

    def wrong(self, what: str, answer: Answer) -> NoReturn:
        """An answer that §7 does not allow."""
        self.accuse(what, status=answer.status, body=answer.body[:400])

    def accuse(self, what: str, **facts: Any) -> NoReturn:
        """A fault of the server."""
        where = {"by": self.plan.name, "message": self.message.id, "standing": self.standing}
        self._ledger.fault(what, **where, acked=self.record.acked, **facts)
        raise WrongError

    def _hear_of_end(self, status: str, final: int) -> NoReturn:
        self.take_end(status, final)
        raise ClosedError

    def _require_line(self, answer: Answer, lines: int) -> None:
        told = answer.json()
        line = told.get("line")
        # Blank lines are counted too, so that a person finds the line in the file.
        if "sequence" not in told or not (isinstance(line, int) and 1 <= line <= 2 * lines):
            self.wrong("a refused line that is not named", answer)
