"""One server over HTTP: a request, and its answer as a type or as an error."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from contextd.client.errors import ApiError, UnreachableError
from contextd.client.steady import SteadyClient

KEPT_CONNECTIONS_MAX = 16  # idle ones, for the next requests

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Page(Protocol[T_co]):
    @property
    def items(self) -> Sequence[T_co]: ...
    @property
    def next_cursor(self) -> str | None: ...


P = TypeVar("P", bound=_Page[Any])


class Wire:
    """Raises `UnreachableError` where no answer comes and `ApiError` for a refusal.

    `timeout_s` bounds each request; `http` is for what needs more than a request and its answer.
    """

    def __init__(
        self, base_url: str, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None
    ) -> None:
        self.base_url = base_url
        self.timeout_s = timeout_s
        # Each `follow` holds a connection: with a limit, pulls could wait for streams to end.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS_MAX)
        try:
            self.http = SteadyClient(
                base_url=base_url, timeout=timeout_s, limits=limits, transport=transport
            )
        except httpx.InvalidURL as error:
            raise UnreachableError(base_url, str(error)) from None

    async def ask(
        self,
        method: str,
        path: str,
        type_: type[T],
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """The answer as a `type_`."""
        response = await self.request(method, path, params, body, timeout_s)
        try:
            return msgspec.json.decode(response.content, type=type_)
        except msgspec.DecodeError:
            raise ApiError.of(response) from None

    async def pages(self, path: str, type_: type[P], **params: Any) -> AsyncGenerator[P]:
        """A list, a page at a time, to its end."""
        while True:
            page = await self.ask("GET", path, type_, params=params)
            yield page
            if page.next_cursor is None:
                return
            params["cursor"] = page.next_cursor

    async def items(self, path: str, type_: type[_Page[T]], **params: Any) -> AsyncGenerator[T]:
        """A list, an item at a time, to its end."""
        async for page in self.pages(path, type_, **params):
            for item in page.items:
                yield item

    async def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """The answer as it came. Parameters that are null are left out."""
        try:
            response = await self.http.request(
                method,
                path,
                params={name: value for name, value in (params or {}).items() if value is not None},
                content=None if body is None else msgspec.json.encode(body),
                headers=None if body is None else {"Content-Type": "application/json"},
                timeout=timeout_s or self.timeout_s,
            )
        except httpx.RequestError as error:
            raise UnreachableError.of(self.base_url, error) from error
        if not response.is_success:
            raise ApiError.of(response)
        return response


def path_of(context_id: str, *rest: str) -> str:
    """Ids may be `.` and `..`, which URLs would take for folders unless the dots are escaped."""
    parts = (quote(part, safe="") for part in (context_id, *rest))
    escaped = (part.replace(".", "%2E") if part in {".", ".."} else part for part in parts)
    return "/contexts/" + "/".join(escaped)
