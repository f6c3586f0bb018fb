"""Where the server listens: whom it may serve, its socket, and what it says of it."""

import resource
import socket
from contextlib import suppress

from rich.console import Console

from contextd import __version__
from contextd.http.gate import LOOPBACK_NAMES
from contextd.settings import Settings, SettingsError

BACKLOG = 4096
OTHER_FILES = 256  # that the process may need beside connections: databases, pipes, modules


def check_exposure(settings: Settings) -> None:
    """Without auth only this machine is served, unless the operator says otherwise (§11).

    Raises `SettingsError`.
    """
    loopback = settings.host in {name.strip("[]") for name in LOOPBACK_NAMES}
    if not loopback and not settings.host.startswith("127.") and not settings.allow_remote:
        raise SettingsError(
            f"--host {settings.host} would serve other machines without any authentication; "
            "say --allow-remote if that is meant"
        )


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises `SettingsError` in words when it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
        ) from None
    return listening


def possible_connections(wanted: int) -> int:
    """How many of `wanted` connections the process can hold, after it was given what it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    possible = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - OTHER_FILES)
    return max(1, possible)


def announce(console: Console, settings: Settings, listening: socket.socket) -> None:
    """Says where the server is, to a person who has just started it (§12)."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    console.print(f"contextd {__version__} listens on {url}", markup=False, highlight=False)
    console.print(
        f"  provider {settings.provider}; try: contextd send --create hello 'Hello' --url {url}",
        style="dim",
        markup=False,
        highlight=False,
    )
