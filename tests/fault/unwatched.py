"""Contexts that no stream watches, with each request at another of several servers.

A server learns from the database what others did to the contexts that it watches. Of all others it
knows what went through it, and must not take that for all there is. So a producer's chunks, its end, a
send, pulls and the deletion come to one server after the other, and every pull is compared with the
database in the same moment: nothing may say `final` or `immutable` that lacks text.
"""

import asyncio
from contextlib import suppress
from random import Random
from typing import Any

from holdings import World
from raw_http import Answer, BrokenError, HungError, request_once

CHUNKS_MAX = 12
GONE_S = 1.0


class Unwatched:
    """One such context after the other until `stop`."""

    def __init__(self, world: World, seed: str) -> None:
        self._world = world
        self._evidence = world.evidence
        self._seed = seed
        self._stopping = False
        self._made = 0
        self._context_id = ""

    async def run(self) -> None:
        """What a kill breaks off is given up, and another context is begun."""
        while not self._stopping:
            try:
                await self.one()
            except (BrokenError, IndexError):
                self._evidence.counts["unwatched contexts that were broken off"] += 1
                await self._abandon()
            except HungError as error:
                self._evidence.fault("an operation that hangs", operation=str(error))

    def stop(self) -> None:
        """After the context that is under way."""
        self._stopping = True

    async def one(self) -> None:
        """The next context, from its creation to its deletion."""
        self._made += 1
        context_id = f"unwatched.{self._seed}.{self._made}".replace(" ", "_")
        self._context_id = context_id
        random = Random(context_id)
        path = f"/contexts/{context_id}/messages"
        if (await self._ask(random, "POST", "/contexts", {"id": context_id})).status != 201:
            return
        await self._ask(random, "PUT", f"{path}/m", {"producer": {"id": "p", "epoch": 1}})
        written = await self._write(random, context_id)
        ending = {"epoch": 1, "final_sequence": written}
        await self._ask(random, "POST", f"{path}/m/complete", ending)
        sent = {"message_id": "u", "payload": {"type": "text", "content": "one two three"}}
        await self._ask(random, "POST", path, sent)
        await self._read_everywhere(context_id, "m")
        await asyncio.sleep(random.uniform(0, 0.2))
        await self._read_everywhere(context_id, "u")
        await self._delete(random, context_id)
        self._evidence.counts["unwatched contexts"] += 1

    async def _abandon(self) -> None:
        """Nothing is left open of the context that was broken off."""
        self._evidence.deleting.add(self._context_id)
        while True:
            await asyncio.sleep(0.1)
            with suppress(BrokenError, IndexError):
                random = Random(self._context_id)
                answer = await self._ask(random, "DELETE", f"/contexts/{self._context_id}", None)
                if answer.status in (204, 404):
                    return

    async def _write(self, random: Random, context_id: str) -> int:
        path = f"/contexts/{context_id}/messages/m"
        head = 0
        for _ in range(random.randint(2, 5)):
            wanted = range(head + 1, head + 1 + random.randint(1, CHUNKS_MAX))
            chunks = [{"sequence": n, "content": f"{n} "} for n in wanted]
            await self._ask(random, "POST", f"{path}/chunks", {"epoch": 1, "chunks": chunks})
            head = wanted[-1]
            if random.random() < 0.6:
                await self._read(random.choice(self._world.ports()), context_id, "m")
        return head

    async def _read_everywhere(self, context_id: str, message_id: str) -> None:
        for port in self._world.ports():
            await self._read(port, context_id, message_id)

    async def _read(self, port: int, context_id: str, message_id: str) -> None:
        """What an answer calls final or immutable is what the database has, to the last letter."""
        path = f"/contexts/{context_id}/messages/{message_id}/content"
        answer = await request_once(port, "GET", path)
        stored = await self._stored(context_id, message_id)
        if answer.status != 200 or stored is None:
            return
        self._evidence.counts["unwatched pulls compared with the database"] += 1
        told, (status, texts) = answer.json(), stored
        settled = told["final"] or "immutable" in answer.headers.get("cache-control", "")
        whole = told["content"] == "".join(texts)
        begun = "".join(texts).startswith(told["content"])
        if not begun or (settled and not (whole and status != "streaming")):
            self._evidence.fault(
                "a pull that is not what the database has",
                context=context_id,
                told={**told, "content": len(told["content"])},
                stored=(status, len(texts)),
            )

    async def _stored(self, context_id: str, message_id: str) -> tuple[str, list[str]] | None:
        truth = self._world.truth
        if not truth.is_open:
            return None
        found = await truth.rows(
            """SELECT m.status, k.content FROM contexts c JOIN messages m ON m.context_key = c.key
               JOIN chunks k ON k.message_key = m.key WHERE c.id = $1 AND m.id = $2
               ORDER BY k.sequence""",
            context_id,
            message_id,
        )
        return (found[0][0], [row[1] for row in found]) if found else None

    async def _delete(self, random: Random, context_id: str) -> None:
        """Its text is gone everywhere within a second, whoever had it in memory."""
        self._evidence.deleting.add(context_id)
        answer = await self._ask(random, "DELETE", f"/contexts/{context_id}", None)
        if answer.status != 204:
            return
        await asyncio.sleep(GONE_S)
        for port in self._world.ports():
            for message_id in ("m", "u"):
                await self._require_gone(port, context_id, message_id)

    async def _require_gone(self, port: int, context_id: str, message_id: str) -> None:
        path = f"/contexts/{context_id}/messages/{message_id}/content"
        for target in (path, f"{path}?from_sequence=0&to_sequence=1"):
            answer = await request_once(port, "GET", target)
            self._evidence.counts["deleted texts asked for"] += 1
            if answer.status not in (404, 503):
                self._evidence.fault(
                    "a deleted text that is still served", context=context_id, status=answer.status
                )

    async def _ask(
        self, random: Random, method: str, target: str, body: dict[str, Any] | None
    ) -> Answer:
        return await request_once(random.choice(self._world.ports()), method, target, body)
