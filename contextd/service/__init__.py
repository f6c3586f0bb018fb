"""What can be done to a context: the one caller of store and hub, for every transport and for turns."""

from contextd.service.branches import Branches
from contextd.service.call_steps import CallSteps
from contextd.service.calls import Calls
from contextd.service.content import Content
from contextd.service.contexts import Contexts
from contextd.service.ledger import Ledger, TurnListener
from contextd.service.messages import Messages
from contextd.service.payloads import Payloads
from contextd.service.producers import Producers
from contextd.service.records import Records
from contextd.service.recovery import Recovery
from contextd.service.retries import Retries
from contextd.service.steps import Steps, TurnLostError, TurnView
from contextd.service.streams import Streams
from contextd.service.toolset import Toolset
from contextd.workflows import Workflows

__all__ = [
    "Branches",
    "CallSteps",
    "Calls",
    "Content",
    "Contexts",
    "Ledger",
    "Messages",
    "Payloads",
    "Producers",
    "Records",
    "Recovery",
    "Retries",
    "Service",
    "Steps",
    "Streams",
    "Toolset",
    "TurnListener",
    "TurnLostError",
    "TurnView",
]


class Service:
    """The rooms of the service, for whoever needs more than one of them."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        contexts: Contexts,
        messages: Messages,
        content: Content,
        records: Records,
        steps: Steps,
        retries: Retries,
        recovery: Recovery,
        producers: Producers,
        branches: Branches,
        calls: Calls,
        call_steps: CallSteps,
        payloads: Payloads,
        workflows: Workflows,
        streams: Streams,
    ) -> None:
        self.ledger = ledger
        self.contexts = contexts
        self.messages = messages
        self.content = content
        self.records = records
        self.steps = steps
        self.retries = retries
        self.recovery = recovery
        self.producers = producers
        self.branches = branches
        self.calls = calls
        self.call_steps = call_steps
        self.payloads = payloads
        self.workflows = workflows
        self.streams = streams
