"""Redirects of a model's server: followed on the server itself, and nowhere else (§6).

A request holds a key and what people have said. Who answers for the server may send it on to another
path; another host, port or scheme is for the operator to name.
"""

from collections.abc import Awaitable, Callable

import httpx2


class RedirectRefusedError(httpx2.RequestError):
    """A redirect leads to another server. Its text names that one, without path and query."""


def staying_on(base_url: str) -> Callable[[httpx2.Request], Awaitable[None]]:
    """A hook for each request of a client, those that follow redirects too.

    Raises `RedirectRefusedError` before anything of a request goes to another server.
    """
    home = _origin(httpx2.URL(base_url))

    async def check(request: httpx2.Request) -> None:
        scheme, host, port = there = _origin(request.url)
        if there != home:
            raise RedirectRefusedError(
                f"it redirects to another server, {scheme}://{host}:{port}, which is not followed",
                request=request,
            )

    return check


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
