"""How a call can fail, and how long to wait before it is tried again."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import httpx
import msgspec

TRIES_MAX = 4
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
WAIT_ASKED_MAX_S = 60.0  # a longer `retry:` or Retry-After is cut to this
PASSING = frozenset({429, 502, 503, 504})  # statuses that another try may find gone

T = TypeVar("T")


class ClientError(Exception):
    """What a call can end with. `passing`: a new try may do, in `retry_after_s` at the soonest."""

    passing = False
    retry_after_s = 0.0


class UnreachableError(ClientError):
    """No answer came: nothing listens there, the connection broke, or time ran out."""

    passing = True

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"contextd is not reachable at {url} ({reason})")
        self.url = url
        self.reason = reason


class ApiError(ClientError):
    """The server refused (§1). `problem` is the whole answer, with the facts of its code.

    `code` is `unexpected_answer` where the answer is not contextd's (a proxy's error page, say).
    """

    def __init__(self, status: int, code: str, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{detail} ({code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.problem = problem
        self.passing = status in PASSING

    @staticmethod
    def of(response: httpx.Response) -> "ApiError":
        """The refusal that a read `response` holds."""
        try:
            problem = msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.DecodeError:
            problem = {}
        code = str(problem.get("code", "unexpected_answer"))
        detail = str(problem.get("detail", f"The server answered {response.status_code}."))
        error = _type_of(code, problem)(response.status_code, code, detail, problem)
        wait = response.headers.get("Retry-After", "")
        error.retry_after_s = float(wait) if wait.isascii() and wait.isdigit() else 0.0
        return error


class MessageClosedError(ApiError):
    """The message is closed: nothing follows (§7). Who goes on writes a new one."""

    @property
    def message_status(self) -> str:
        """How it is closed, `interrupted` for a producer that was silent for too long."""
        return str(self.problem.get("message_status", ""))

    @property
    def final_sequence(self) -> int:
        """How many chunks it has."""
        return int(self.problem.get("final_sequence") or 0)


class CancelledByViewerError(MessageClosedError):
    """Somebody cancelled what the message's context was doing (§6): stop writing."""


class TakenOverError(ApiError):
    """Another producer writes the message now, in the higher `epoch` (§7): leave it alone."""

    @property
    def epoch(self) -> int:
        """The current one."""
        return int(self.problem.get("epoch") or 0)


def _type_of(code: str, problem: Mapping[str, Any]) -> type[ApiError]:
    if code == "stale_producer":
        return TakenOverError
    if code != "message_closed":
        return ApiError
    return (
        CancelledByViewerError
        if problem.get("message_status") == "cancelled"
        else (MessageClosedError)
    )


def reason_of(error: httpx.TransportError) -> str:
    """One line for people; several of httpx's errors have no text but their name."""
    return " ".join(str(error).split()) or type(error).__name__


def pause_s(failures: int, asked_s: float = 0.0) -> float:
    """The wait after that many failures in a row: jittered, exponential, at least as asked."""
    backoff_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
    jittered_s = backoff_s * random.uniform(0.5, 1)  # noqa: S311 - spreads clients, hides nothing
    return max(jittered_s, min(asked_s, WAIT_ASKED_MAX_S))


async def patiently(call: Callable[[], Awaitable[T]], *, tries_max: int | None = TRIES_MAX) -> T:
    """`call`, again while its failure may pass. Only for what repeats without harm.

    `tries_max` null: until it is answered, as `follow` does, however long the server is away.
    """
    failures = 0
    while True:
        try:
            return await call()
        except ClientError as error:
            failures += 1
            last = tries_max is not None and failures >= tries_max
            if last or not error.passing or error.retry_after_s > BACKOFF_MAX_S:
                raise
            await asyncio.sleep(pause_s(failures, error.retry_after_s))


async def persistently(call: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """`call`, again while its failure may pass, for `patience_s` from the first failure on.

    Only for what repeats without harm. Raises the last failure.
    """
    clock_s = asyncio.get_running_loop().time
    failures, deadline_s = 0, 0.0
    while True:
        try:
            return await call()
        except ClientError as error:
            if not error.passing:
                raise
            failures += 1
            deadline_s = deadline_s or clock_s() + patience_s
            wait_s = pause_s(failures, error.retry_after_s)
            if clock_s() + wait_s > deadline_s:
                raise
            await asyncio.sleep(wait_s)
