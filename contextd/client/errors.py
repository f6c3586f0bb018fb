"""How a call can fail, which failures may pass, and how long to wait before another try.

A failure may pass (nothing listens there, 429, 503), may pass or be a defect (500, an answer that is not
contextd's), or can never pass (400, 404). The second kind is tried again too, but only `DOUBTS_MAX`
times in a row, so that nobody waits for ever for what stays broken.
"""

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
DOUBTS_MAX = 6  # tries in a row that may fail for a reason that may not pass
PASSING = frozenset({408, 425, 429, 502, 503, 504})  # statuses that another try may find gone
NEVER_PASSING = frozenset({501, 505})  # other statuses from 500 on may pass
UNEXPECTED = "unexpected_answer"

T = TypeVar("T")


class ClientError(Exception):
    """What a call can end with. `passing`: a new try may do, in `retry_after_s` at the soonest.

    `doubtful`: it may also be a defect, which no number of tries cures.
    """

    passing = False
    doubtful = False
    retry_after_s = 0.0


class UnreachableError(ClientError):
    """No answer came: nothing listens there, the connection broke, or time ran out."""

    passing = True

    def __init__(self, url: str, reason: str, *, passing: bool = True) -> None:
        super().__init__(f"contextd is not reachable at {url} ({reason})")
        self.url = url
        self.reason = reason
        self.passing = passing

    @staticmethod
    def of(url: str, error: httpx.RequestError) -> "UnreachableError":
        """What httpx found. A request that cannot be made at all cannot be made later either."""
        hopeless = isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError)
        return UnreachableError(url, reason_of(error), passing=not hopeless)


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
        self.doubtful = _is_doubtful(status, code)
        self.passing = status in PASSING or self.doubtful

    @staticmethod
    def of(response: httpx.Response) -> "ApiError":
        """The refusal that a read `response` holds."""
        try:
            problem = msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.DecodeError:
            problem = {}
        code = str(problem.get("code", UNEXPECTED))
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


def _is_doubtful(status: int, code: str) -> bool:
    """Whether it may pass or be a defect: of the server, or of something that answers in its place."""
    if status in PASSING or status in NEVER_PASSING or 300 <= status < 400:
        return False
    return status >= 500 or code == UNEXPECTED


def reason_of(error: httpx.RequestError) -> str:
    """One line for people; several of httpx's errors have no text but their name."""
    return " ".join(str(error).split()) or type(error).__name__


def pause_s(failures: int, asked_s: float = 0.0) -> float:
    """The wait after that many failures in a row: jittered, exponential, at least as asked."""
    backoff_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
    jittered_s = backoff_s * random.uniform(0.5, 1)  # noqa: S311 - spreads clients, hides nothing
    return max(jittered_s, min(asked_s, WAIT_ASKED_MAX_S))


class Tries:
    """The failures of one thing that is tried again and again, in a row.

    `tries_max` and `patience_s` (from the first failure on) bound them; without either they have no
    end but that of doubtful ones.
    """

    def __init__(self, *, tries_max: int | None = None, patience_s: float | None = None) -> None:
        self._tries_max = tries_max
        self._patience_s = patience_s
        self._deadline_s: float | None = None
        self._failures = 0
        self._doubts = 0

    def succeeded(self) -> None:
        """The next failure is a first one."""
        self._failures = self._doubts = 0
        self._deadline_s = None

    def pause_s(self, error: ClientError) -> float:
        """The wait before the next try. Raises `error` where there is to be none."""
        self._failures += 1
        self._doubts += error.doubtful
        wait_s = pause_s(self._failures, error.retry_after_s)
        if not error.passing or self._doubts >= DOUBTS_MAX or self._is_over(error, wait_s):
            raise error
        return wait_s

    def _is_over(self, error: ClientError, wait_s: float) -> bool:
        if self._tries_max is not None:
            return self._failures >= self._tries_max or error.retry_after_s > BACKOFF_MAX_S
        if self._patience_s is None:
            return False
        now_s = asyncio.get_running_loop().time()
        if self._deadline_s is None:
            self._deadline_s = now_s + self._patience_s
        return now_s + wait_s > self._deadline_s


async def patiently(call: Callable[[], Awaitable[T]], *, tries_max: int | None = TRIES_MAX) -> T:
    """`call`, again while its failure may pass. Only for what repeats without harm.

    `tries_max` null: until it is answered, as `follow` does, however long the server is away.
    """
    return await _tried(call, Tries(tries_max=tries_max))


async def persistently(call: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """`call`, again while its failure may pass, for `patience_s` from the first failure on.

    Only for what repeats without harm. Raises the last failure.
    """
    return await _tried(call, Tries(patience_s=patience_s))


async def _tried(call: Callable[[], Awaitable[T]], tries: Tries) -> T:
    while True:
        try:
            return await call()
        except ClientError as error:
            await asyncio.sleep(tries.pause_s(error))
