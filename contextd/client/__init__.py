"""The async client. It stands on the wire contract alone: nothing of the server is imported."""

from contextd.client.api import DEFAULT_URL, Client
from contextd.client.errors import ApiError, ClientError, UnreachableError
from contextd.client.events import (
    Closed,
    Current,
    Disconnected,
    Event,
    Restarted,
    StateChange,
    Text,
)

__all__ = [
    "DEFAULT_URL",
    "ApiError",
    "Client",
    "ClientError",
    "Closed",
    "Current",
    "Disconnected",
    "Event",
    "Restarted",
    "StateChange",
    "Text",
    "UnreachableError",
]
