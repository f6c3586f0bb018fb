"""A conversation that calls tools with everybody around it: driver, readers, deciders, answerers."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conversation import Conversation
from crowd import Crowd, Manners
from holdings import World
from tool_book import Book
from tool_calls_verdict import CallCheck, user_messages
from tool_conversation import ToolConversation
from tool_people import Answerer, Decider, Person
from tool_rows import stored_calls
from tool_verdict import Transition, TurnCheck, check_answers, check_steps, frozen
from verdict import check_conversation
from witness import Witness

DECIDERS = 2
ANSWERERS = 1
REST_S_MAX = 0.2  # between two deeds of the driver, so that tools come to run


@dataclass(frozen=True)
class Place:
    """Where the tools of a run leave their traces, and the table that its journals are held to."""

    book: Book
    workspace: Path
    table: set[Transition]


class ToolCrowd(Crowd):
    """One conversation. `place` as in `Place`, the rest as in `Crowd`."""

    conversation: ToolConversation

    def __init__(
        self,
        world: World,
        name: str,
        manners: Manners,
        place: Place,
        *,
        seed: str,
        operating: Callable[[str], None],
    ) -> None:
        self._place = place
        super().__init__(world, name, manners, seed=seed, operating=operating)

    def _converse(self, name: str, manners: Manners) -> Conversation:
        return ToolConversation(
            name,
            self.random,
            self.evidence,
            manners.sends,
            manners.script_s_max,
            title=name,
            book=str(self._place.book.path),
        )

    async def _go_on(self) -> None:
        if not self.hurry:
            await asyncio.sleep(self.random.choice((0.0, self.random.uniform(0, REST_S_MAX))))
        await super()._go_on()

    def _admit_readers(self) -> None:
        super()._admit_readers()
        names = [("decider", Decider)] * DECIDERS + [("answerer", Answerer)] * ANSWERERS
        for number, (role, kind) in enumerate(names):
            name = f"{self.conversation.id} {role} {number}"
            person: Person = kind(self.world, self.conversation, name, self._seed, self._operating)
            self._tasks.append(asyncio.create_task(person.run()))

    def _patience_is_over(self) -> bool:
        """Readers have time for as long as the server is killed; after that, as long as others."""
        return self.hurry

    async def _judge(self) -> None:
        truth, conversation = self.world.truth, self.conversation
        row = await truth.context(conversation.id)
        assert row is not None
        told = frozen(conversation.ledger)
        calls = await stored_calls(truth, row.key)
        messages, turns = await truth.messages(row.key), await truth.turns(row.key)
        journal = await truth.journal(row.key)
        texts = {message.id: message.text for message in messages}
        await check_conversation(truth, conversation, TurnCheck(conversation, calls))
        check_steps(self.evidence, conversation.id, journal, self._place.table)
        check_answers(self.evidence, told, calls, texts)
        check = CallCheck(
            conversation,
            book=self._place.book,
            workspace=self._place.workspace,
            texts=texts,
            turns=turns,
            journal=journal,
        )
        check.check(calls, user_messages(turns, messages))


async def check_answers_kept(truth: Witness, conversation: ToolConversation) -> None:
    """What people were answered of this conversation's calls is still so."""
    if conversation.id in conversation.evidence.deleting:
        return  # it may be gone; that it is not half gone is looked at elsewhere
    told = frozen(conversation.ledger)
    row = await truth.context(conversation.id)
    if row is None:
        return  # its creation was not answered, or it is accused elsewhere
    calls = await stored_calls(truth, row.key)
    texts = {message.id: message.text for message in await truth.messages(row.key)}
    check_answers(conversation.evidence, told, calls, texts)
