"""Keeping the text of a stream while it is passed on (`Client.wrap`)."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

from contextd.client.producing import ProducedMessage

T = TypeVar("T")


def whole(item: str) -> str:
    """The text of an item that is text."""
    return item


async def wrapped(
    produced: AbstractAsyncContextManager[ProducedMessage],
    source: AsyncIterable[T],
    text: Callable[[T], str | None],
) -> AsyncGenerator[T]:
    """The items of `source`. Each one's text is on its way before the item is handed out."""
    async with produced as message, _closing(aiter(source)) as items:
        async for item in items:
            if found := text(item):
                await message.write(found)
            yield item


@asynccontextmanager
async def _closing(items: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T]]:
    """A loop that is left leaves its iterator open: a generator would hold its connection on."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
