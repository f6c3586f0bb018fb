"""One context with everybody around it: producers, a sender, readers, and who cancels or deletes it.

What is to be done to it comes by `wish`, and is done between its own doings. It is over when all is at
rest, read and compared, or deleted.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
from conversation import Conversation
from crowd import HABITS, listing
from evidence import Evidence
from forgetting import require_forgotten
from holdings import World
from poll_reader import SETTLE_S_MAX, PollReader, is_settled, required_of, settle
from producer_crew import Worker
from producer_plan import Author, MessagePlan, ProducerPlan, make_contested, make_messages
from producer_verdict import Limits, Written, check_produced, records_of
from raw_http import Answer, BrokenError, Connection, HungError
from strict_readers import REST_STATES, SignalReader
from verdict import check_conversation
from witness import StoredContext, StoredMessage, Witness

PAUSE_S_MAX = 0.08
ACT_SHARE = 0.08
REST_S_MAX = 90.0
RIVAL_PAUSE_S = 0.6
CONTEST_SHARE = 0.5
CONTEST_PAUSE_S = 0.3


@dataclass(frozen=True)
class Setting:
    """What all stages of a run share. `starts_ms`: when servers were started."""

    world: World
    seed: str
    folder: Path
    port: int  # of the proxy of producers
    port_file: Path
    silence_s: float
    starts_ms: Sequence[float]
    client_share: float
    brief: bool = False
    planted: str = ""


class Stage:
    """Used once. `happened` is called with the name of each fault as it is done."""

    def __init__(self, setting: Setting, name: str, happened: Callable[[str], None]) -> None:
        self._setting = setting
        self._world = setting.world
        self.evidence: Evidence = setting.world.evidence
        self.random = Random(f"{setting.seed}:{name}")
        self.conversation = Conversation(
            name, self.random, self.evidence, self.random.randint(1, 7), 0.3, title=name
        )
        self.workers: list[Worker] = []
        self.over = False
        self.hurry = False  # nothing new is sent any more
        self.wishes: set[str] = set()
        self._happened = happened
        self._cancelled = False
        self._plans: dict[str, MessagePlan] = {}
        self._readers: list[SignalReader | PollReader] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._connection: Connection | None = None
        self._resting_since: float | None = None
        self._worked_until: float | None = None

    @property
    def is_deleting(self) -> bool:
        """Whether a deletion was asked for."""
        return self.conversation.id in self.evidence.deleting

    @property
    def busy_workers(self) -> list[Worker]:
        """Those with a process that is not frozen."""
        return [one for one in self.workers if one.is_running and not one.frozen]

    def wish(self, what: str) -> None:
        """cancel | delete | rival, soon."""
        self.wishes.add(what)

    async def run(self) -> None:
        """From the creation to the last comparison."""
        try:
            while not self.over:
                try:
                    await self._go_on()
                except BrokenError:
                    self.evidence.counts["operations broken off"] += 1
                except HungError as error:
                    self.evidence.fault("an operation that hangs", operation=str(error))
                await self._world.up.wait()
                await asyncio.sleep(self.random.uniform(0, PAUSE_S_MAX))
            self._add_counts()
        except Exception as error:
            self.evidence.fault("a stage that broke", error=repr(error))
            raise
        finally:
            await self._close()

    async def _go_on(self) -> None:
        conversation = self.conversation
        if not conversation.created:
            await conversation.create(self._ask)
            self._admit_readers()
            await self._hire()
        elif conversation.deleted:
            await conversation.require_gone(self._ask)
            await require_forgotten(self._world, conversation)
            self.over = self._all_know_the_end()
        elif self.is_deleting:
            await conversation.delete(self._ask)
        elif self.wishes:
            await self._grant(self.wishes.pop())
        elif not all(worker.is_over for worker in self.workers):
            await self._live_on()
        else:
            self.over = await self._finish()

    async def _live_on(self) -> None:
        conversation = self.conversation
        if conversation.sends_left > 0 and not self.hurry and self.random.random() < ACT_SHARE:
            await conversation.act(self._ask)

    # Who writes.

    async def _hire(self) -> None:
        for number in range(1, self.random.choice((1, 2, 2, 3)) + 1):
            name = f"{self.conversation.id}.p{number}"
            count = 1 if self._setting.brief else self.random.choice((1, 2, 4))
            messages = make_messages(self.random, name, count)
            if self._setting.planted:
                messages = tuple(replace(one, numbered=False, fenced=True) for one in messages)
            await self._begin(name, messages, take_backs=3, pause_s=0.0)
        if self.random.random() < CONTEST_SHARE:
            await self._hire_rivals()

    async def _hire_rivals(self) -> None:
        """Two or three who take one message from each other, again and again."""
        contested = make_contested(self.random, f"{self.conversation.id}.x")
        for number in range(self.random.choice((2, 2, 3))):
            name = f"{contested.id}{number}"
            await self._begin(name, (contested,), take_backs=3, pause_s=CONTEST_PAUSE_S)
            if number:
                self._happened("rivals")

    async def _begin(
        self, name: str, messages: tuple[MessagePlan, ...], *, take_backs: int, pause_s: float
    ) -> None:
        setting = self._setting
        plan = ProducerPlan(
            name,
            self.conversation.id,
            setting.seed,
            setting.port,
            str(setting.port_file),
            str(setting.folder / f"{name}.ledger"),
            messages,
            take_backs=take_backs,
            pause_s=pause_s,
            via="client" if self.random.random() < setting.client_share else "bare",
            planted=setting.planted,
        )
        self._plans |= {message.id: message for message in messages}
        worker = Worker(plan, self.evidence)
        self.workers.append(worker)
        await worker.start()

    # What is done to it.

    async def _grant(self, wish: str) -> None:
        match wish:
            case "cancel":
                await self._cancel()
            case "delete":
                if any(worker.is_running for worker in self.workers):
                    self._happened("deletions")
                await self.conversation.delete(self._ask)
            case _:
                await self._send_rival()

    async def _cancel(self) -> None:
        """A viewer's cancel closes whatever was open when it came."""
        opened = await self._open_produced()
        answer = await self._ask("POST", f"/contexts/{self.conversation.id}/cancel", {})
        if answer.status != 200:
            self.evidence.fault("a refused cancel", status=answer.status, body=answer.body[:300])
            return
        turn_id = answer.json()["cancelled_turn_id"]
        if turn_id is not None:
            self.conversation.cancelled_turns.add(turn_id)
        if opened:
            self._happened("cancels")
        left = opened & await self._open_produced()
        if left:
            self.evidence.fault("a cancel that left messages open", messages=sorted(left))

    async def _open_produced(self) -> set[str]:
        if not self._world.truth.is_open:
            return set()
        found = await self._world.truth.rows(
            """SELECT m.id FROM contexts c JOIN messages m ON m.context_key = c.key
               JOIN heads h ON h.message_key = m.key
               WHERE c.id = $1 AND m.status = 'streaming' AND h.producer_id IS NOT NULL""",
            self.conversation.id,
        )
        return {row[0] for row in found}

    async def _send_rival(self) -> None:
        """Another producer takes over what is open; who had it goes on as if nothing had been.

        Some of those who have it stand still meanwhile, and wake up in an epoch that has passed.
        """
        opened = sorted(await self._open_produced())
        contested = [self._plans[name] for name in opened if self._plans[name].fenced]
        if not contested:
            return
        name = f"{self.conversation.id}.r{len(self.workers)}"
        contest = self.random.choice(contested)
        message = replace(contest, ending="complete")
        take_backs = self.random.choice((0, 1, 2))
        overtaken = [
            worker for worker in self.busy_workers if contest.id in worker.plan.message_ids
        ]
        asleep = overtaken if self.random.random() < 0.5 else []
        for worker in asleep:
            worker.freeze()
        await self._begin(name, (message,), take_backs=take_backs, pause_s=RIVAL_PAUSE_S)
        self._happened("rivals")
        await asyncio.sleep(self.random.uniform(0, RIVAL_PAUSE_S) if asleep else 0)
        for worker in asleep:
            worker.thaw()

    # Its end.

    def _all_know_the_end(self) -> bool:
        for worker in self.workers:
            if worker.is_running and self._is_late():
                self.evidence.fault("a producer that was not told of the end", by=worker.plan.name)
                return True
        return all(reader.gone for reader in self._readers) and all(
            not worker.is_running for worker in self.workers
        )

    def _is_late(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._worked_until = self._worked_until or now + REST_S_MAX
        return now > self._worked_until

    async def _finish(self) -> bool:
        """Whether all is at rest and read; if so, everything is compared."""
        truth, conversation = self._world.truth, self.conversation
        if not truth.is_open:
            return False
        row = await truth.context(conversation.id)
        state = (await truth.states()).get(conversation.id)
        if row is None or state is None or state[0] not in REST_STATES or state[1]:
            self._resting_since = None
            if self._is_late():
                self.evidence.fault("a context that never came to rest", context=conversation.id)
                return True
            return False
        messages = await truth.messages(row.key)
        texts = {message.id: message.text for message in messages}
        listed = [message.id for message in listing(messages)]
        if not self._patience_is_over() and not all(
            is_settled(reader, required_of(reader, texts, listed)) for reader in self._readers
        ):
            return False
        for reader in self._readers:
            await settle(reader, texts, listed)
        await check_conversation(truth, conversation)
        await self.compare(truth)
        self._count_ends(messages)
        return True

    def _patience_is_over(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._resting_since = self._resting_since or now
        return self.hurry or now - self._resting_since > SETTLE_S_MAX

    def _count_ends(self, messages: Sequence[StoredMessage]) -> None:
        self.evidence.counts["contexts compared at the end"] += 1
        for message in messages:
            if message.id in self._plans:
                self.evidence.counts[f"produced messages, {message.status}"] += 1

    async def compare(self, truth: Witness) -> None:
        """The stored text of each message against the ledgers, at any moment."""
        before = [worker.account() for worker in self.workers]
        row = await truth.context(self.conversation.id)
        stored = await truth.messages(row.key) if row is not None else []
        closed_at_ms = await _closings(truth, row)
        after = [worker.account() for worker in self.workers]
        if self.is_deleting:
            return
        limits = Limits(self._setting.silence_s, tuple(self._setting.starts_ms), self._cancelled)
        by_id = {message.id: message for message in stored}
        for message_id, plan in self._plans.items():
            written = Written(
                plan,
                Author(self._setting.seed, message_id),
                records_of(before, message_id),
                records_of(after, message_id),
                limits,
                closed_at_ms.get(message_id),
            )
            check_produced(self.evidence, written, by_id.get(message_id))

    def take_accusations(self) -> None:
        """What producers have accused the server of becomes a fault of the run."""
        for worker in self.workers:
            account = worker.account()
            for fault in account.faults:
                self.evidence.fault(fault["fault"], **fault["facts"])
            if account.gone and not self.is_deleting:
                self.evidence.fault("a context that nobody deleted is gone", by=worker.plan.name)

    def _add_counts(self) -> None:
        counts: Counter[str] = self.evidence.counts
        for worker in self.workers:
            counts.update(worker.account().counts)
        counts["producers"] += len(self.workers)
        self.take_accusations()

    # Around it.

    def _admit_readers(self) -> None:
        name, cursor = self.conversation.id, self.conversation.cursor
        assert cursor is not None
        shift = self.random.randrange(len(HABITS))
        polling = PollReader(self._world, name, f"{name} poll", f"{self._setting.seed}:{name}:poll")
        self._readers.append(polling)
        for number in range(2):
            habits, by = HABITS[(shift + number) % len(HABITS)], f"{name} reader {number}"
            seed = f"{self._setting.seed}:{by}"
            self._readers.append(SignalReader(self._world, name, by, habits, cursor, seed))
        self._tasks += [asyncio.create_task(reader.run()) for reader in self._readers]

    async def _ask(self, method: str, target: str, body: dict[str, Any] | None) -> Answer:
        port = self._world.direct_port()
        if port is None:
            raise BrokenError("no server is up")
        # Noted before it goes out: whether it was done stays open when the server dies.
        interrupts = body is not None and body.get("on_busy") == "interrupt"
        self._cancelled |= target.endswith("/cancel") or interrupts
        if self._connection is None or self._connection.port != port:
            self._hang_up()
            self._connection = Connection(port)
        encoded = None if body is None else msgspec.json.encode(body)
        return await self._connection.request(method, target, body=encoded)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _close(self) -> None:
        for worker in self.workers:
            await worker.kill()
        for reader in self._readers:
            reader.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for reader in self._readers:
            await reader.close()
        self._hang_up()


async def _closings(truth: Witness, row: StoredContext | None) -> dict[str, float]:
    if row is None:
        return {}
    found = await truth.rows(
        "SELECT id, completed_at FROM messages WHERE context_key = $1", row.key
    )
    return {message_id: at for message_id, at in found if at is not None}
