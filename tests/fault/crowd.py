"""A conversation with everybody around it: who drives it, who reads it, and the end of it.

A crowd lives through crashes: what breaks is tried again, by senders and readers alike. It is over
when the conversation is at rest and each reader holds all of it; then everything is compared.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
from conversation import Conversation
from evidence import Evidence
from forgetting import require_forgotten
from holdings import World
from poll_reader import SETTLE_S_MAX, PollReader, is_settled, required_of, settle
from raw_http import Answer, BrokenError, Connection, HungError
from strict_readers import REST_STATES, Habits, SignalReader
from verdict import check_conversation
from witness import StoredMessage

HABITS = (
    Habits(way="json", throttle_ms=0),
    Habits(way="bounded", throttle_ms=30),
    Habits(way="bounded", named=True),
    Habits(way="plain", throttle_ms=1000, start="garbage"),
    Habits(way="chunks", throttle_ms=10, garbage_share=0.3),
    Habits(way="json", start="listed", pause_s_max=0.05),
    Habits(way="bounded", start="listed", throttle_ms=300),
    Habits(way="json", garbage_share=0.5, named=True),
)
LATE_S_MAX = 2.0
PAUSE_S_MAX = 0.06
SETTLE_LOOK_S = 0.05


@dataclass(frozen=True)
class Manners:
    """How hard a run is on its conversations."""

    sends: int = 6
    script_s_max: float = 0.6
    readers: int = 3
    delete_share: float = 0.0


class Crowd:
    """One conversation. `operating` is called with the name of each operation as it goes out."""

    def __init__(
        self,
        world: World,
        name: str,
        manners: Manners,
        *,
        seed: str,
        operating: Callable[[str], None] = lambda _: None,
        via_proxy: bool = False,
    ) -> None:
        self.world = world
        self.evidence: Evidence = world.evidence
        self.random = Random(f"{seed}:{name}")
        self.conversation = self._converse(name, manners)
        self.over = False
        self.hurry = False  # nothing new is sent any more
        self._manners = manners
        self._seed = f"{seed}:{name}"
        self._operating = operating
        self._via_proxy = via_proxy
        self._doomed = self.random.random() < manners.delete_share
        self._readers: list[SignalReader | PollReader] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._connection: Connection | None = None
        self._resting_since: float | None = None

    def _converse(self, name: str, manners: Manners) -> Conversation:
        return Conversation(
            name, self.random, self.evidence, manners.sends, manners.script_s_max, title=name
        )

    @property
    def stage(self) -> str:
        """For a report of what a run hangs on."""
        waiting = [
            f"{reader.name}: {sum(not one.final for one in reader.messages.values())} open"
            for reader in self._readers
        ]
        return f"{self.conversation.id} {self.conversation.operation} {waiting}"

    async def run(self) -> None:
        """From the creation to the last comparison."""
        try:
            while not self.over:
                try:
                    await self._go_on()
                except (BrokenError, HungError) as error:
                    self.evidence.counts["operations broken off"] += 1
                    if isinstance(error, HungError):
                        self.evidence.fault("an operation that hangs", operation=str(error))
                await self.world.up.wait()
                await asyncio.sleep(self.random.uniform(0, PAUSE_S_MAX))
        except Exception as error:
            self.evidence.fault("a driver that broke", error=repr(error))
            raise
        finally:
            await self._close()

    async def _go_on(self) -> None:
        conversation = self.conversation
        if not conversation.created:
            await conversation.create(self._ask)
            if conversation.created:
                self._admit_readers()
        elif conversation.deleted:
            await conversation.require_gone(self._ask)
            await require_forgotten(self.world, conversation)
            self.over = await self._readers_know_the_end()
        elif conversation.id in self.evidence.deleting:
            await conversation.delete(self._ask)
        elif conversation.sends_left > 0 and not self.hurry:
            await conversation.act(self._ask)
        elif self._doomed:
            await conversation.delete(self._ask)
        else:
            self.over = await self._finish()

    async def _readers_know_the_end(self) -> bool:
        return all(reader.gone for reader in self._readers)

    async def _finish(self) -> bool:
        """Whether all is at rest and read; if so, everything is compared."""
        truth, conversation = self.world.truth, self.conversation
        if not truth.is_open:
            return False
        row = await truth.context(conversation.id)
        state = (await truth.states()).get(conversation.id)
        if row is None or state is None or state[0] not in REST_STATES or state[1]:
            self._resting_since = None
            await asyncio.sleep(SETTLE_LOOK_S)
            return False
        messages = await truth.messages(row.key)
        texts = {message.id: message.text for message in messages}
        listed = [message.id for message in listing(messages)]
        await self._require_rest(messages, [*listed])
        if not self._patience_is_over() and not all(
            is_settled(reader, required_of(reader, texts, listed)) for reader in self._readers
        ):
            await asyncio.sleep(SETTLE_LOOK_S)
            return False
        for reader in self._readers:
            await settle(reader, texts, listed)
        await self._judge()
        self.evidence.counts["conversations compared at the end"] += 1
        return True

    async def _judge(self) -> None:
        await check_conversation(self.world.truth, self.conversation)

    def _patience_is_over(self) -> bool:
        """Whether readers have had their time: those that lack something still are accused then."""
        now = asyncio.get_running_loop().time()
        self._resting_since = self._resting_since or now
        return self.hurry or now - self._resting_since > SETTLE_S_MAX

    async def _require_rest(self, messages: Sequence[StoredMessage], listed: list[str]) -> None:
        """What the API says of a conversation at rest is what the database holds."""
        base = f"/contexts/{self.conversation.id}/messages"
        answer = await self._ask("GET", f"{base}?limit=1000", None)
        if answer.status == 503:
            return
        ids = [item["id"] for item in answer.json()["items"]]
        if ids != listed:
            self.evidence.fault("another list", context=self.conversation.id, ids=ids, want=listed)
        for message in messages:
            if message.superseded:
                answer = await self._ask("GET", f"{base}/{message.id}", None)
                if answer.status == 503:
                    return
                if answer.status != 200 or answer.json()["status"] != message.status:
                    self.evidence.fault("a message that cannot be read by id", message=message.id)

    def _admit_readers(self) -> None:
        conversation = self.conversation
        assert conversation.cursor is not None
        shift = self.random.randrange(len(HABITS))
        for number in range(self._manners.readers):
            name = f"{conversation.id} reader {number}"
            reader: SignalReader | PollReader
            if number == 1:
                reader = PollReader(self.world, conversation.id, name, f"{self._seed}:{name}")
            else:
                habits = HABITS[(shift + number) % len(HABITS)]
                reader = SignalReader(
                    self.world,
                    conversation.id,
                    name,
                    habits,
                    conversation.cursor,
                    f"{self._seed}:{name}",
                )
            self._readers.append(reader)
            late_s = self.random.uniform(0, LATE_S_MAX) if number >= 2 else 0.0
            self._tasks.append(asyncio.create_task(_begin_late(reader, late_s)))

    async def _ask(self, method: str, target: str, body: dict[str, Any] | None) -> Answer:
        port = self.world.port if self._via_proxy else self.world.direct_port()
        if port is None:
            raise BrokenError("no server is up")
        if self._connection is None or self._connection.port != port or self.random.random() < 0.3:
            self._hang_up()
            self._connection = Connection(port)
        if method != "GET":
            self._operating(self.conversation.operation)
        encoded = None if body is None else msgspec.json.encode(body)
        return await self._connection.request(method, target, body=encoded)

    async def _close(self) -> None:
        for reader in self._readers:
            reader.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reader in self._readers:
            await reader.close()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def listing(messages: Sequence[StoredMessage]) -> list[StoredMessage]:
    """What a list shows of a conversation with one branch and nothing queued, in its order."""
    placed = [message for message in messages if message.depth is not None]
    return sorted(
        (message for message in placed if not message.superseded),
        key=lambda message: message.depth or 0,
    )


async def _begin_late(reader: SignalReader | PollReader, late_s: float) -> None:
    await asyncio.sleep(late_s)
    await reader.run()
