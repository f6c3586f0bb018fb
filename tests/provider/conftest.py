"""A Chat Completions server on a free loopback port, in the test's own event loop."""

from collections.abc import AsyncIterator

import pytest
from asking import KEY
from fake_chat import FakeChat, serving

from contextd.provider.openai import OpenAIProvider


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever proxy this machine uses, loopback is reached without it."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
async def chat() -> AsyncIterator[FakeChat]:
    async with serving(FakeChat()) as chat:
        yield chat


@pytest.fixture
async def openai(chat: FakeChat) -> AsyncIterator[OpenAIProvider]:
    """The provider, with a key and no model of its own, on the fake server."""
    provider = OpenAIProvider(base_url=chat.url, api_key=KEY, model=None, timeout_s=10)
    yield provider
    await provider.aclose()
