"""A provider that is loaded when it is first asked, as its SDK takes half a second to import."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from contextd.provider import Event, ModelRequest, Provider


class LateProvider:
    """What `load` makes, once somebody asks it. `load` runs in a thread."""

    def __init__(self, name: str, load: Callable[[], Provider]) -> None:
        self.name = name
        self._load = load
        self._loading = asyncio.Lock()
        self._loaded: Provider | None = None

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        """The model's answer. Raises `ProviderError`."""
        async with self._loading:
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(self._load)
        async with aclosing(self._loaded.stream(request)) as events:
            async for event in events:
                yield event

    async def aclose(self) -> None:
        """Lets go of what it has, if it was ever asked."""
        if self._loaded is not None:
            await self._loaded.aclose()
