"""The client, async and without `await`. It stands on the wire contract alone: nothing of the server
is imported.
"""

from contextd.client.api import DEFAULT_URL, Client
from contextd.client.errors import (
    ApiError,
    CancelledByViewerError,
    ClientError,
    MessageClosedError,
    TakenOverError,
    UnreachableError,
)
from contextd.client.events import (
    Closed,
    Current,
    Disconnected,
    Event,
    Restarted,
    StateChange,
    Text,
)
from contextd.client.producing import ProducedMessage, ProduceOptions
from contextd.client.sync import SyncClient, SyncProducedMessage
from contextd.core.message import FileReferencePayload, TextPayload, Usage, WorkflowPayload
from contextd.core.tool_call import ToolDecision

__all__ = [
    "DEFAULT_URL",
    "ApiError",
    "CancelledByViewerError",
    "Client",
    "ClientError",
    "Closed",
    "Current",
    "Disconnected",
    "Event",
    "FileReferencePayload",
    "MessageClosedError",
    "ProduceOptions",
    "ProducedMessage",
    "Restarted",
    "StateChange",
    "SyncClient",
    "SyncProducedMessage",
    "TakenOverError",
    "Text",
    "TextPayload",
    "ToolDecision",
    "UnreachableError",
    "Usage",
    "WorkflowPayload",
]
