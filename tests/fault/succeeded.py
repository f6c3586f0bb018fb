"""How servers are watched from outside while one of them stands still, or their database is another one.

`Successor` asks each server by itself, and compares what it serves with the database that is there.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from evidence import Evidence
from holdings import World
from raw_http import Answer, BrokenError, EventStream, HungError, request_once

LOOK_S = 0.02
NOTICE_S_MAX = 60.0
STREAM_SILENCE_S = 30.0
OLD_MAX = 12  # messages of the database before that are asked for at the one after


class Successor:
    """For one fault. `name` is a prefix of contexts of its own."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._evidence = world.evidence
        self._name = name.replace(" ", "_")
        self._cursors: dict[int, str] = {}  # by port: whose database a server serves
        self._unready: set[int] = set()
        self._old: list[tuple[str, str]] = []
        self._streams: list[asyncio.Task[None]] = []
        self._opened: set[int] = set()
        self.attached = asyncio.Event()  # to all servers

    async def longest_gap_s(self, seconds: float) -> float:
        """The longest time between two writes that each living server answered."""
        gaps = await asyncio.gather(
            *(self._write_for(port, seconds) for port in self._world.ports())
        )
        return max(gaps, default=0.0)

    async def _write_for(self, port: int, seconds: float) -> float:
        loop = asyncio.get_running_loop()
        context_id = f"{self._name}.{port}"
        longest, before = 0.0, loop.time()
        deadline = before + seconds
        path, method, number = "/contexts", "POST", 0
        while loop.time() < deadline:
            body = {"id": context_id} if number == 0 else {"title": f"{number}"}
            answer = await request_once(port, method, path, body)
            longest, before = max(longest, loop.time() - before), loop.time()
            if answer.status in (200, 201):
                path, method, number = f"/contexts/{context_id}", "PATCH", number + 1
                self._evidence.counts["writes while one stood still"] += 1
            elif answer.status == 503:
                self._evidence.counts["writes refused while one stood still"] += 1
            else:
                self._evidence.fault("a wrong answer to a write", status=answer.status)
                break
        return longest

    # Another database.

    async def look_before(self, evidence: Evidence) -> None:
        """Notes what there is, and brings some of it into the memory of each server."""
        known = [(c, m) for c, messages in evidence.messages.items() for m in messages]
        self._old = known[-OLD_MAX:]
        for port in self._world.ports():
            context_id = f"{self._name}.{port}"
            answer = await self._patiently(port, "POST", "/contexts", {"id": context_id})
            self._cursors[port] = answer.json()["stream_cursor"].partition("-")[0]
            await self._send(port, context_id, "of the database before")
            self._old.append((context_id, "u"))
            for context, message in self._old:
                await self._pull(port, context, message)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Streams of what was, and looks at the readiness of each server, until the block ends."""
        tasks = [asyncio.create_task(self._look_at(port)) for port in self._cursors]
        self._streams = [asyncio.create_task(self._follow(port)) for port in self._cursors]
        try:
            yield
        finally:
            for task in (*tasks, *self._streams):
                task.cancel()
            await asyncio.gather(*tasks, *self._streams, return_exceptions=True)

    async def require_noticed(self) -> None:
        """Each server gives cursors of another database, was not ready before, and ended its streams."""
        for port in self._world.ports():
            try:
                async with asyncio.timeout(NOTICE_S_MAX):
                    await self._notice(port)
            except TimeoutError:
                self._evidence.fault("a server that does not notice another database", port=port)
        ended, open_ones = await asyncio.wait(self._streams, timeout=NOTICE_S_MAX)
        if open_ones or any(task.exception() for task in ended):
            self._evidence.fault("a stream of a database that is gone")
        for port in self._cursors.keys() & set(self._world.ports()):
            if port not in self._unready:
                self._evidence.fault("a server that was ready all the time", port=port)

    async def _notice(self, port: int) -> None:
        context_id, number = f"{self._name}.after.{port}", 0
        while True:
            number += 1
            body = {"id": f"{context_id}.{number}"}
            with suppress(BrokenError):
                answer = await request_once(port, "POST", "/contexts", body)
                cursor = answer.json().get("stream_cursor", "").partition("-")[0]
                if answer.status == 201 and cursor != self._cursors.get(port):
                    self._evidence.counts["servers that served another database"] += 1
                    return
                self._evidence.counts[f"writes before it was noticed, {answer.status}"] += 1
            await asyncio.sleep(LOOK_S)

    async def require_new_text(self) -> None:
        """What has the same ids as before is as the database that is there has it, at each server."""
        for context_id, _ in self._old:
            for port in self._world.ports()[:1]:
                await self._patiently(port, "POST", "/contexts", {"id": context_id})
                await self._send(port, context_id, "of the database after")
        for context_id, message_id in self._old:
            for port in self._world.ports():
                await self._compare(port, context_id, message_id)
                await self._compare(port, context_id, "after")

    async def _compare(self, port: int, context_id: str, message_id: str) -> None:
        answer = await self._pull(port, context_id, message_id)
        truth = self._world.truth
        row = await truth.context(context_id)
        stored = {one.id: one for one in await truth.messages(row.key)} if row else {}
        wanted = stored.get(message_id)
        told = answer.json()["content"] if answer.status == 200 else None
        self._evidence.counts["texts compared with the database after"] += 1
        if wanted is None and answer.status == 404:
            return
        if wanted is None or told is None or not wanted.text.startswith(told):
            self._evidence.fault(
                "text that is not of this database",
                context=context_id,
                message=message_id,
                status=answer.status,
            )

    async def _send(self, port: int, context_id: str, content: str) -> None:
        message_id = "u" if content.endswith("before") else "after"
        payload = {"type": "text", "content": content}
        body = {"message_id": message_id, "payload": payload, "respond": False}
        await self._patiently(port, "POST", f"/contexts/{context_id}/messages", body)

    async def _pull(self, port: int, context_id: str, message_id: str) -> Answer:
        target = f"/contexts/{context_id}/messages/{message_id}/content"
        return await self._patiently(port, "GET", target)

    async def _patiently(
        self, port: int, method: str, target: str, body: dict[str, Any] | None = None
    ) -> Answer:
        while True:
            with suppress(BrokenError):
                answer = await request_once(port, method, target, body)
                if answer.status != 503:
                    return answer
            await asyncio.sleep(LOOK_S)

    async def _look_at(self, port: int) -> None:
        """Until it is cancelled."""
        while True:
            with suppress(BrokenError, HungError):
                if (await request_once(port, "GET", "/health/ready")).status == 503:
                    self._unready.add(port)
            await asyncio.sleep(LOOK_S)

    async def _follow(self, port: int) -> None:
        """Until the server ends it."""
        target = f"/contexts/{self._name}.{port}/stream?heartbeat=5"
        with suppress(BrokenError):
            stream = await EventStream.open(port, target)
            try:
                async for _ in stream.events(STREAM_SILENCE_S):
                    self._opened.add(port)
                    if self._opened == self._cursors.keys():
                        self.attached.set()
            finally:
                stream.close()
