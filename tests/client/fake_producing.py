"""Producing (§7) as the fake server does it: strict about the contract, unkind about answers.

`faults` are used up from the front, one a request of that verb (`open`, `chunks`, `complete`, `fail`):
`lost` is carried out and not answered, `cut` is not carried out, `late` is carried out when `released`
is set and not answered, a number is refused with that status, None goes well. While `held` is clear,
requests with chunks wait.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from fake_wire import FakeContext, FakeMessage, Request, message_json

if TYPE_CHECKING:
    from fake_contextd import FakeContextd


class RefusedError(Exception):
    def __init__(self, code: str, **facts: Any) -> None:
        super().__init__(code)
        self.code = code
        self.facts = facts


class FakeProducing:
    def __init__(self, fake: "FakeContextd") -> None:
        self._fake = fake
        self.faults: dict[str, list[str | int | None]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.held = asyncio.Event()
        self.held.set()
        self.released = asyncio.Event()

    def bodies(self, verb: str) -> list[dict[str, Any]]:
        """What was asked for with this verb."""
        return [body for asked, body in self.asked if asked == verb]

    def batches(self) -> list[list[str]]:
        """The contents of each request with chunks."""
        return [[chunk["content"] for chunk in body["chunks"]] for body in self.bodies("chunks")]

    async def answer(
        self, request: Request, context: FakeContext, id_: str, verb: str = "open"
    ) -> None:
        self.asked.append((verb, request.body))
        await self._note()
        fault = self.faults[verb].pop(0) if self.faults.get(verb) else None
        if verb == "chunks":
            await self.held.wait()
        if fault == "late":
            await self.released.wait()
        if fault == "cut":
            await request.cut()
        if isinstance(fault, int):
            await request.refuse(fault, "overloaded", "Busy", self._fake.faults.retry_after)
            return
        try:
            status, body = self._do(verb, context, id_, request.body)
        except RefusedError as refused:
            code = 404 if refused.code.endswith("not_found") else 409
            await request.refuse(code, refused.code, "Refused", **refused.facts)
            return
        await self._note()
        if fault in {"lost", "late"}:
            await request.cut()
        await request.answer(status, body)

    async def _note(self) -> None:
        async with self._fake.noted:
            self._fake.noted.notify_all()

    def _do(
        self, verb: str, context: FakeContext, id_: str, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        if verb == "open":
            return self._open(context, id_, body)
        message = context.messages.get(id_)
        if message is None:
            raise RefusedError("message_not_found")
        if body.get("epoch", message.epoch) != message.epoch:
            raise RefusedError("stale_producer", epoch=message.epoch)
        if verb == "chunks":
            return self._append(context, message, body)
        return self._close(context, message, verb, body)

    def _open(
        self, context: FakeContext, id_: str, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        producer, message = body["producer"], context.messages.get(id_)
        if message is None:
            epoch = producer.get("epoch", 1)
            message = FakeMessage(id_, body["role"], body["kind"])
            message.producer_id, message.epoch = producer["id"], epoch
            context.messages[id_] = message
            self._fake.append(context, id_)
            self._fake.set_state(context, "producing")
            return 201, message_json(context, message)
        self._require_open(message)
        epoch = producer.get("epoch", message.epoch + 1)
        same = epoch == message.epoch and producer["id"] == message.producer_id
        if epoch <= message.epoch and not same:
            raise RefusedError("stale_producer", epoch=message.epoch)
        message.producer_id, message.epoch = producer["id"], epoch
        return 200, message_json(context, message)

    def _append(
        self, context: FakeContext, message: FakeMessage, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        head, new = len(message.chunks), []
        for chunk in body["chunks"]:
            sequence, content = chunk["sequence"], chunk["content"]
            if sequence <= head:
                if message.chunks[sequence - 1] != content:
                    raise RefusedError("sequence_conflict", sequence=sequence)
                continue
            if sequence != head + len(new) + 1:
                raise RefusedError("sequence_gap", expected_sequence=head + len(new) + 1)
            new.append(content)
        if new:
            self._require_open(message)
            self._fake.append(context, message.id, *new)
        counts = {"accepted": len(new), "duplicates": len(body["chunks"]) - len(new)}
        return 200, {"message_id": message.id, "sequence": head + len(new), **counts}

    def _close(
        self, context: FakeContext, message: FakeMessage, verb: str, body: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        status = "completed" if verb == "complete" else "failed"
        if message.status != status:
            self._require_open(message)
            head = len(message.chunks)
            if body.get("final_sequence", head) != head:
                raise RefusedError("sequence_gap", expected_sequence=head + 1)
            message.finish_reason, message.usage = body.get("finish_reason"), body.get("usage")
            message.error = body.get("error")
            self._fake.close(context, message.id, status)
            self._fake.set_state(context, "idle")
        return 200, message_json(context, message)

    def _require_open(self, message: FakeMessage) -> None:
        if message.status != "streaming":
            facts = {"message_status": message.status, "final_sequence": len(message.chunks)}
            raise RefusedError("message_closed", **facts)
