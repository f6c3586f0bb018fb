"""Somebody outside the servers: asks any of them, as a balancer would choose, and asks again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from virtual_server import Cut, Server

from contextd.core.errors import Overloaded, ShuttingDown
from contextd.service import Service

if TYPE_CHECKING:
    from world import World

T = TypeVar("T")
UNKNOWN = (Cut, Overloaded, ShuttingDown)  # done or not, and worth another try
TRIES = 40


class Actor:
    """Somebody outside, with chance of their own."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.rng = world.rng(name)

    def note(self, what: str) -> None:
        self.world.note(self.name, what)

    async def pause(self, most_s: float) -> None:
        await asyncio.sleep(self.rng.random() * most_s)

    def anywhere(self) -> Server:
        """What a balancer would choose."""
        servers = self.world.servers
        accepting = [server for server in servers if server.accepts] or servers
        return self.rng.choice(accepting)

    async def once(self, what: str, work: Callable[[Service], Awaitable[T]]) -> T:
        """One request, anywhere."""
        server = self.anywhere()
        try:
            answer = await server.ask(work)
        except Exception as error:
            self.note(f"{what} at {server.name}: {type(error).__name__} {error}")
            raise
        self.note(f"{what} at {server.name}: done")
        return answer

    async def stubborn(self, what: str, work: Callable[[Service], Awaitable[T]]) -> T:
        """The same request until somebody answers it."""
        for _ in range(TRIES):
            try:
                return await self.once(what, work)
            except UNKNOWN:
                await self.pause(0.5)
        raise Cut
