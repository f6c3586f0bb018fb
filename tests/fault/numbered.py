"""A producer that knows its own text, and viewers that hold one number each, through faults.

The producer repeats what was not answered, with the same sequences; a viewer asks for what follows its
number, wherever its connection leads. At the end both and the database have the same text.
"""

import asyncio
from random import Random
from typing import Any

import msgspec
from holdings import World
from raw_http import Answer, BrokenError, Connection, HungError
from witness import Witness

VIEWERS = 2
CHUNKS_MAX = 60
BATCH_MAX = 6
PAUSE_S_MAX = 0.08


class Numbered:
    """One such message after the other, each in a context of its own, until `stop`."""

    def __init__(self, world: World, name: str, seed: str) -> None:
        self._world = world
        self._evidence = world.evidence
        self._name = name
        self._random = Random(f"{seed}:{name}")
        self._stopping = False
        self._made = 0
        self._context_id = ""
        self._acked = 0

    def stop(self) -> None:
        """After the message that is under way."""
        self._stopping = True

    async def run(self) -> None:
        """Raises nothing: what is wrong is evidence."""
        while not self._stopping:
            await self._one()

    async def check_kept(self, truth: Witness) -> None:
        """What was acknowledged is in the database."""
        context_id, acked = self._context_id, self._acked
        if acked and ((await truth.head(context_id, "m")) or 0) < acked:
            self._evidence.fault("acknowledged chunks are lost", context=context_id, acked=acked)

    async def _one(self) -> None:
        self._made += 1
        self._acked = 0
        self._context_id = context_id = f"{self._name}.{self._made}"
        count = self._random.randint(10, CHUNKS_MAX)
        texts = [f"[{context_id}:{sequence} 🙂] " for sequence in range(1, count + 1)]
        path = f"/contexts/{context_id}/messages/m"
        await self._ask("POST", "/contexts", {"id": context_id}, 201, 200)
        await self._ask("PUT", path, {"producer": {"id": "p", "epoch": 1}}, 201, 200)
        async with asyncio.TaskGroup() as group:
            viewing = [group.create_task(self._view(path)) for _ in range(VIEWERS)]
            await self._write(path, texts)
        for viewed in viewing:
            if viewed.result() != "".join(texts):
                self._evidence.fault("a viewer with another text", context=context_id)
        await self._compare(context_id, texts)

    async def _write(self, path: str, texts: list[str]) -> None:
        while self._acked < len(texts):
            first = self._acked + 1
            batch = texts[self._acked : self._acked + self._random.randint(1, BATCH_MAX)]
            chunks = [
                {"sequence": sequence, "content": content}
                for sequence, content in enumerate(batch, start=first)
            ]
            body = {"epoch": 1, "chunks": chunks}
            answer = await self._ask("POST", f"{path}/chunks", body, 200)
            told = answer.json()
            self._evidence.counts["chunks acknowledged"] += len(batch)
            self._evidence.counts["chunks that had been stored"] += told["duplicates"]
            if told["sequence"] != first + len(batch) - 1:
                self._evidence.fault("an append that is answered otherwise", told=told)
            self._acked = first + len(batch) - 1
            await asyncio.sleep(self._random.uniform(0, PAUSE_S_MAX))
        await self._ask("POST", f"{path}/complete", {"epoch": 1, "final_sequence": len(texts)}, 200)

    async def _view(self, path: str) -> str:
        """One number is all that it holds beside the text."""
        held, sequence, final = "", 0, False
        while not final:
            target = f"{path}/content?from_sequence={sequence}&wait=2"
            told = (await self._ask("GET", target, None, 200)).json()
            self._evidence.counts["pulls by number"] += 1
            if told["from_sequence"] != sequence or told["sequence"] < sequence:
                self._evidence.fault("a pull of another range", path=path, told=told["sequence"])
            held, sequence, final = held + told["content"], told["sequence"], told["final"]
        return held

    async def _compare(self, context_id: str, texts: list[str]) -> None:
        truth = self._world.truth
        row = await truth.context(context_id)
        stored = await truth.messages(row.key) if row else []
        if [list(message.chunks) for message in stored] != [texts]:
            self._evidence.fault("stored chunks that are not the producer's", context=context_id)
        self._evidence.counts["numbered messages compared at the end"] += 1

    async def _ask(
        self, method: str, target: str, body: dict[str, Any] | None, *wanted: int
    ) -> Answer:
        """Until it is answered, at whichever server; anything but `wanted` and 503 is a fault."""
        encoded = None if body is None else msgspec.json.encode(body)
        while True:
            answer = await self._try(method, target, encoded)
            if answer is not None and answer.status in wanted:
                return answer
            if answer is not None and answer.status != 503:
                self._evidence.fault(
                    "a wrong answer", target=target, status=answer.status, body=answer.body[:200]
                )
                await asyncio.sleep(1)
            await self._world.up.wait()
            await asyncio.sleep(self._random.uniform(0, PAUSE_S_MAX))

    async def _try(self, method: str, target: str, body: bytes | None) -> Answer | None:
        connection = Connection(self._world.port)
        try:
            return await connection.request(method, target, body=body)
        except BrokenError:
            self._evidence.counts["broken requests by number"] += 1
        except HungError as error:
            self._evidence.fault("an operation that hangs", operation=str(error))
        finally:
            connection.close()
        return None
