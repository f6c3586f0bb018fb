"""Open messages in this process, written by the benchmark instead of by a model."""

from contextd.app import Contextd
from contextd.core.context import ContextRequest
from contextd.core.message import SendRequest, TextPayload
from contextd.service import TurnListener
from contextd.store.notices import StartedTurn
from contextd.store.tail import LiveMessage

LEASE_S = 3600  # nobody renews the leases of these turns, and none must be recovered


class Opened(TurnListener):
    """Takes the turns that start, in place of the agent loop."""

    def __init__(self) -> None:
        self.turns: list[StartedTurn] = []

    def turn_started(self, turn: StartedTurn) -> None:
        """Its message is opened by `open_message`."""
        self.turns.append(turn)


async def open_message(contextd: Contextd, context_id: str) -> tuple[StartedTurn, LiveMessage]:
    """A new context with a turn in it, and the turn's answer, which has one chunk so far."""
    opened = Opened()
    service = contextd.service
    service.ledger.listener = opened
    await service.contexts.create(ContextRequest(id=context_id))
    await service.messages.send(context_id, SendRequest(payload=TextPayload(content="Go on")))
    turn = opened.turns[-1]
    await service.steps.request_llm(turn)
    first = {"message_id": service.ledger.new_id(), "kind": "text", "texts": ["0" * 20]}
    return turn, await service.steps.open_message(turn, **first)
