"""Shares of the threads: one context whose tools hang takes none from the others."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from contextd.core.values import JsonObject
from contextd.tools import Outcome, Tool
from contextd.tools.execution import execute
from contextd.tools.threads import Threads

SHORT_S = 0.05


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    """At the end nothing hangs any more."""
    event = threading.Event()
    yield event
    event.set()


def of(threads: Threads, function: Callable[[], object]) -> Tool:
    async def run(_arguments: JsonObject) -> object:
        return await threads.run(function)

    return Tool(name="one", description="", parameters={}, run=run)


async def once(tool: Tool, share: str) -> Outcome:
    return await execute(tool, {}, timeout_s=SHORT_S, result_bytes_max=1000, share=share)


async def test_a_share_that_hangs_is_used_up_for_its_owner_only(let_go: threading.Event) -> None:
    """Its next call is refused, whoever else calls has threads."""
    threads = Threads(10, 2)
    hanging, quick = of(threads, let_go.wait), of(threads, lambda: "x")
    for _ in range(2):
        assert (await once(hanging, "a")).status == "timed_out"
    refused = await once(quick, "a")
    assert (refused.status, refused.error) == ("failed", "overloaded")
    assert "2 others" in refused.content
    assert (await once(quick, "b")).content == "x"


async def test_all_shares_together_are_bounded(let_go: threading.Event) -> None:
    """And a thread that comes back can be had by anybody."""
    threads = Threads(2, 2)
    hanging, quick = of(threads, let_go.wait), of(threads, lambda: "x")
    for share in "ab":
        assert (await once(hanging, share)).status == "timed_out"
    assert (await once(quick, "c")).error == "overloaded"
    let_go.set()
    async with asyncio.timeout(10):
        while (await once(quick, "c")).error == "overloaded":
            await asyncio.sleep(SHORT_S)
