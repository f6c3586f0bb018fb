"""A reader without a stream, and how any reader comes to its end.

`PollReader` lists what has changed and pulls with `wait`. `settle` waits until a reader holds all that
there is, and compares it.
"""

import asyncio
from collections.abc import Collection, Mapping
from random import Random
from typing import Any

from holdings import Holder, World
from strict_readers import SignalReader

SETTLE_S_MAX = 20.0


class PollReader(Holder):
    """Reads without a stream: what has changed from lists, the text by pulls that wait."""

    def __init__(self, world: World, context_id: str, name: str, seed: str) -> None:
        super().__init__(world, context_id, name, "json", Random(seed))
        self._revision = 0
        self._stopping = False

    async def run(self) -> None:
        """Until `stop`, or until the context is deleted."""
        try:
            while not self._stopping and not self.gone:
                await self._look()
                await asyncio.sleep(self.random.uniform(0.02, 0.2))
        except Exception as error:
            self.evidence.fault("a reader that broke", by=self.name, error=repr(error))

    def stop(self) -> None:
        """Ends `run` soon."""
        self._stopping = True

    async def _look(self) -> None:
        """Everything that has changed since the last look, page by page."""
        include = "&include=content" if self.random.random() < 0.3 else ""
        limit = self.random.choice((1, 5, 100))
        base = f"/contexts/{self.context_id}/messages?since_revision={self._revision}"
        target = f"{base}&limit={limit}{include}"
        cursor, first = "", None
        while cursor is not None:
            answer = await self.ask(target + (f"&cursor={cursor}" if cursor else ""))
            if not self.accept(answer):
                return
            page = answer.json()
            first = page["revision"] if first is None else first
            for item in page["items"]:
                self._note(item)
            cursor = page["next_cursor"]
        if first is not None and first < self._revision:
            self.evidence.fault("a list of an older revision", by=self.name, revision=first)
        self._revision = max(self._revision, first or 0)
        self.progress.set()

    def _note(self, item: dict[str, Any]) -> None:
        message_id = item["id"]
        self.evidence.counts["messages listed"] += 1
        self.evidence.reached(self.context_id, message_id, item["current_sequence"], self.name)
        self.evidence.described(self.context_id, message_id, item["role"], item["kind"], self.name)
        if item["status"] != "streaming":
            status, final = item["status"], item["final_sequence"]
            self.evidence.closed(self.context_id, message_id, status, final, self.name)
        if "content" in item:
            self.evidence.pulled(
                self.context_id,
                message_id,
                0,
                item["content_sequence"],
                item["content"],
                self.name,
            )
        holding = self.holding(message_id)
        if holding.task is None:
            holding.task = asyncio.create_task(self._poll_content(message_id))

    async def _poll_content(self, message_id: str) -> None:
        holding = self.holding(message_id)
        path = f"/contexts/{self.context_id}/messages/{message_id}/content"
        while not holding.final and not self.gone:
            wait_s = self.random.choice(("0.05", "1", "5", "30"))
            answer = await self.ask(f"{path}?from_sequence={holding.sequence}&wait={wait_s}")
            self.evidence.counts["pulls, wait"] += 1
            if self.accept(answer):
                await self.take_pull(holding, answer.json())
            self.progress.set()


def is_settled(reader: SignalReader | PollReader, required: Collection[str]) -> bool:
    """Whether the reader holds these messages, and all that it has heard of, to the end."""
    held = reader.messages
    return all(name in held for name in required) and all(one.final for one in held.values())


def required_of(
    reader: SignalReader | PollReader, texts: Mapping[str, str], listed: Collection[str]
) -> Collection[str]:
    """The messages that the reader must know.

    Who began with a list need not know of what had left the lists by then: only of `listed`.
    """
    return listed if isinstance(reader, SignalReader) and reader.began_with_list else texts


async def settle(
    reader: SignalReader | PollReader, texts: Mapping[str, str], listed: Collection[str]
) -> bool:
    """Waits until the reader holds everything to the end, and compares it with `texts`, by message id."""
    required = required_of(reader, texts, listed)
    deadline = asyncio.get_running_loop().time() + SETTLE_S_MAX
    while not is_settled(reader, required):
        reader.progress.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await reader.progress.wait()
        except TimeoutError:
            reader.evidence.fault(
                "a reader that was not told of everything",
                by=reader.name,
                context=reader.context_id,
                unheard=sorted(set(required) - reader.messages.keys())[:5],
                unfinished=[one for one in reader.messages.values() if not one.final][:2],
            )
            return False
    for message_id, holding in reader.messages.items():
        wanted = texts.get(message_id)
        if wanted is None or holding.text.encode() != wanted.encode():
            reader.evidence.fault("a reader with another text", by=reader.name, message=message_id)
    reader.evidence.counts["texts compared at the end"] += len(reader.messages)
    return True
