"""The promises of docs/architecture.md, checked while a run goes on and when it has come to rest."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from truth import MessageFact, expect
from virtual_loop import Process
from virtual_server import Server

from contextd.core.machine import REST_STATES
from contextd.provider import ModelRequest
from contextd.service.content import is_final
from contextd.service.steps import WAITING_STATES
from contextd.signals.frames import Closing, Head, Standing
from contextd.store.reader import ContentSlice

if TYPE_CHECKING:
    from world import World

LATE_S = 2.2  # within a poll, with what a slow store adds
FRESH_S = 4.0  # how long after its last change a message is compared after each step


class Promises:
    """Of one run. `dirty`: something was committed or told since the last step that was checked."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._truth = world.truth
        self.dirty = False
        self._told: set[tuple[str, int]] = set()
        self._asked: dict[str, set[tuple[int, int]]] = {}
        self._since: dict[
            tuple[str, ...], float
        ] = {}  # since when something is not as it should be

    # What the hub is told.

    def head_published(self, process: Process | None, head: Head) -> None:
        """No position before its commit, and the text is there before the signal."""
        self.dirty = True
        fact = self._truth.message(head.context_id, head.message_id)
        expect(
            fact is not None, f"{process_name(process)} told of {head.message_id}, not committed"
        )
        if fact is None:
            return
        words = f"{process_name(process)} told position {head.position} of {fact.id}"
        expect(head.position <= fact.head, f"{words}, and {fact.head} are committed")
        self._findable(process, fact, head.position, words)

    def published(
        self, process: Process | None, revision: int, closings: Sequence[Closing], now: Standing
    ) -> None:
        """No revision before its commit, and each once."""
        words = f"{process_name(process)} told revision {revision} of {now.context_id}"
        expect((now.context_id, revision) not in self._told, f"{words}, which was told before")
        self._told.add((now.context_id, revision))
        self._committed(process, closings, now, words)

    def filled(
        self,
        process: Process | None,
        closings: Sequence[Closing],
        now: Standing,
        heads: Sequence[Head],
    ) -> None:
        """What was read anew is committed, too."""
        self._committed(process, closings, now, f"{process_name(process)} filled {now.context_id}")
        for head in heads:
            fact = self._truth.message(head.context_id, head.message_id)
            ahead = fact is None or head.position > fact.head
            expect(not ahead, f"{process_name(process)} filled {head.message_id}, not committed")

    def _committed(
        self, process: Process | None, closings: Sequence[Closing], now: Standing, words: str
    ) -> None:
        self.dirty = True
        context = self._truth.contexts.get(now.context_id)
        known = context is not None and now.revision <= context.revision
        expect(known, f"{words}: {now.revision} is not committed")
        for closing in closings:
            fact = self._truth.message(closing.context_id, closing.message_id)
            if fact is None:
                continue
            told, stored = (closing.status, closing.final), (fact.status, fact.final)
            expect(told == stored, f"{words}: {fact.id} as {told}, and {stored} is committed")

    def _findable(
        self, process: Process | None, fact: MessageFact, position: int, words: str
    ) -> None:
        if isinstance(process, Server) and process.service is not None and position:
            found = process.service.content.live(fact.context_id, fact.id, position - 1, None)
            there = found is None or found.sequence >= position
            expect(there, f"{words}, and a pull there finds {found and found.sequence}")

    # What a server answers.

    def pulled(
        self, server: Server, context_id: str, message_id: str, start: int, found: ContentSlice
    ) -> MessageFact | None:
        """An answer to a pull: exactly this text, nothing that is not committed, and final for ever."""
        fact = self._truth.message(context_id, message_id)
        expect(fact is not None, f"{server.name} answered a pull of {message_id}, not committed")
        if fact is None:
            return None
        words = f"{server.name} answered a pull of {message_id} after {start}: {found.sequence}"
        words = f"{words} of {found.head}, {found.status}"
        expect(found.head <= fact.head, f"{words}, and {fact.head} are committed")
        exact = fact.text(start, found.sequence)
        expect(found.content == exact, f"{words}: {found.content!r}, stored {exact!r}")
        if found.status != "streaming":
            stored = (fact.status, fact.final)
            same = (found.status, found.head) == stored
            expect(same, f"{words}, and {stored} is committed")
        if is_final(found.status, found.sequence, found.head):
            expect(found.sequence == fact.final, f"{words} is final, and {fact.final} are stored")
        return fact

    # After each step.

    def step(self) -> None:
        """What servers answer from memory is what is committed."""
        if not self.dirty:
            return
        self.dirty = False
        now = asyncio.get_running_loop().time()
        for context in self._truth.alive():
            for fact in context.messages.values():
                if fact.open or fact.changed_at > now - FRESH_S:
                    self._compare_memories(fact)

    def _compare_memories(self, fact: MessageFact) -> None:
        for server in self._world.servers:
            if server.service is None or server.gone.is_set():
                continue
            for start in {0, max(0, fact.head - 1)}:
                found = server.service.content.live(fact.context_id, fact.id, start, None)
                if found is not None:
                    self.pulled(server, fact.context_id, fact.id, start, found)

    def look_at_all(self) -> None:
        """At the end: the same of all that there is."""
        for context in self._truth.alive():
            for fact in context.messages.values():
                self._compare_memories(fact)

    # A few times a second.

    def look_round(self) -> None:
        """What has to be so within a poll; not while the store, or a server, is disturbed."""
        self._world.truth.look()
        late: set[tuple[str, ...]] = set()
        for server in self._world.servers:
            if server.up:
                late |= self._late_at(server)
        late |= self._turns_without_task()
        self._judge(late)

    def _judge(self, late: set[tuple[str, ...]]) -> None:
        now = asyncio.get_running_loop().time()
        calm = now - self._world.disturbed_at
        self._since = {key: self._since.get(key, now) for key in late}
        for key, since in self._since.items():
            if min(now - since, calm) > LATE_S:
                expect(False, " ".join(key) + f", for {now - since:.1f} s")

    def _late_at(self, server: Server) -> set[tuple[str, ...]]:
        late: set[tuple[str, ...]] = set()
        assert server.service is not None
        live = server.service.content.live
        for context in self._truth.contexts.values():
            for fact in context.messages.values():
                found = live(context.id, fact.id, 0, None)
                if found is None:
                    continue
                if context.deleted_at is not None:
                    late.add((server.name, "still has the deleted text of", fact.id))
                elif found.head < fact.head or found.status != fact.status:
                    late.add((server.name, "is behind with", fact.id, str(found.head)))
        return late

    def _turns_without_task(self) -> set[tuple[str, ...]]:
        """A running turn of a server that lives has a task there."""
        names = {server.owner_id: server for server in self._world.servers if server.up}
        waiting = tuple(state.value for state in WAITING_STATES)
        rows = self._truth.query(
            "SELECT t.id, t.owner_id, c.state FROM turns t JOIN contexts c ON c.key = t.context_key"
            " WHERE t.status = 'running'"
        )
        late: set[tuple[str, ...]] = set()
        for row in rows:
            server = names.get(row["owner_id"])
            if server is None or row["state"] in waiting:
                continue
            if f"turn-{row['id']}" not in {task.get_name() for task in server.tasks}:
                late.add((server.name, "has no task for its running turn", row["id"]))
        return late

    # What the model is asked.

    def asked(self, server: Server, request: ModelRequest) -> None:
        """Each attempt asks once for each round of tools, and there are no more than allowed."""
        rounds = len(request.history)
        words = (
            f"{server.name} asked the model for turn {request.turn_id}, attempt {request.attempt}"
        )
        most = self._world.settings.attempts_max
        expect(request.attempt <= most, f"{words} of {most}")
        asked = self._asked.setdefault(request.turn_id, set())
        expect((request.attempt, rounds) not in asked, f"{words}, a second time")
        asked.add((request.attempt, rounds))
        self._world.note(server, f"asks the model: {request.turn_id} attempt {request.attempt}")

    # At the end.

    def unrest(self) -> list[str]:
        """What has not come to rest yet."""
        found = []
        for context in self._truth.alive():
            if context.state not in REST_STATES:
                found.append(f"{context.id} is in {context.state}")
            found += [
                f"turn {turn} of {context.id} is {status}"
                for turn, status in context.turns.items()
                if status in ("queued", "running")
            ]
            found += [f"{fact.id} is open" for fact in context.messages.values() if fact.open]
        return found


def process_name(process: Process | None) -> str:
    return "nobody" if process is None else process.name
