"""`SyncClient`: the same client without `await`, against a real server."""
# ruff: noqa: PT012 - what is tested is how a block ends, so the block is in `raises`

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import Server

from contextd.client import (
    ApiError,
    CancelledByViewerError,
    Client,
    Closed,
    Current,
    ProducedMessage,
    StateChange,
    SyncClient,
    SyncProducedMessage,
    Text,
    UnreachableError,
    Usage,
)

WAIT_S = 60  # a hang, not a measure

INTERRUPTED = """
import sys
from contextd.client import SyncClient
with SyncClient(sys.argv[1]) as client, client.produce(sys.argv[2], message_id="m") as message:
    message.write("half")
    for event in client.follow(sys.argv[2]):
        print("following", flush=True)
"""


@pytest.fixture
def client(server: Server) -> Iterator[SyncClient]:
    with SyncClient(server.url) as client:
        yield client


@pytest.fixture
def context_id(client: SyncClient) -> str:
    return client.create_context().id


@pytest.mark.parametrize(
    ("sync", "original"), [(SyncClient, Client), (SyncProducedMessage, ProducedMessage)]
)
def test_it_has_all_methods(sync: type, original: type) -> None:
    """Each public method and attribute, under the same name and with the same description."""
    names = {name for name in dir(original) if not name.startswith("_")}
    assert names - {"aclose"} <= set(dir(sync))
    for name in names - {"aclose", "wrap"}:
        if inspect.isfunction(member := getattr(original, name)):
            assert inspect.signature(getattr(sync, name)) == inspect.signature(member)
            assert getattr(sync, name).__doc__ == member.__doc__


def test_a_conversation(client: SyncClient, context_id: str) -> None:
    """Send, follow, read and list, as the async client does it."""
    assert client.update_context(context_id, title="Tea").title == "Tea"
    answer = client.send(context_id, "hello there")
    told = []
    for event in client.follow(context_id):
        told.append(event)
        if isinstance(event, StateChange) and event.state == "idle":
            break
    assert any(isinstance(event, Current) for event in told)
    (closed,) = (event for event in told if isinstance(event, Closed))
    text = "".join(event.content for event in told if isinstance(event, Text))
    assert text == "You said: hello there"
    assert client.pull(context_id, closed.message_id).content == text
    assert client.pull(context_id, closed.message_id, 1).content == "said: hello there"
    assert [m.content for m in client.messages(context_id, content=True)] == ["hello there", text]
    assert [turn.id for turn in client.turns(context_id)] == [answer.turn_id]
    assert client.get_context(context_id).title == "Tea"
    assert context_id in [context.id for context in client.contexts()]


def test_a_message_is_produced(client: SyncClient, context_id: str) -> None:
    """Written, flushed, completed on leaving; resumed by its id."""
    with client.produce(context_id, kind="thinking") as message:
        message.write("a")
        message.flush()
        assert (message.context_id, message.epoch, message.sequence) == (context_id, 1, 1)
        assert message.stored_text() == "a"
        message.finish_reason = "length"
        message.usage = Usage(prompt_tokens=4)
    stored = client.get_message(context_id, message.id)
    assert (stored.status, stored.kind) == ("completed", "thinking")
    assert (stored.finish_reason, stored.usage) == (message.finish_reason, message.usage)


def test_an_exception_fails_the_message(client: SyncClient, context_id: str) -> None:
    """It goes on as it is."""
    error = ValueError("secret")
    produced = client.produce(context_id)
    with pytest.raises(ValueError, match="secret") as caught, produced as message:
        message.write("half")
        raise error
    assert caught.value is error
    stored = client.get_message(context_id, message.id)
    assert stored.error is not None
    assert (stored.status, stored.error.type) == ("failed", "ValueError")


def test_a_viewers_cancel_is_raised(client: SyncClient, context_id: str) -> None:
    """By the method that the script waits for."""
    with pytest.raises(CancelledByViewerError), client.produce(context_id) as message:
        client.cancel(context_id)
        message.write("x")
        message.flush()


def test_an_iterator_is_wrapped(client: SyncClient, context_id: str) -> None:
    """Passed on untouched and kept; stopping early closes the source and the message."""
    numbers = client.wrap(context_id, [1, 2, 3], text=str, message_id="all")
    assert list(numbers) == [1, 2, 3]
    assert client.pull(context_id, "all").content == "123"
    closed: list[bool] = []

    def source() -> Iterator[str]:
        try:
            while True:
                yield "a"
        finally:
            closed.append(True)

    pieces = client.wrap(context_id, source(), message_id="some")
    assert next(pieces) == "a"
    pieces.close()
    stored = client.get_message(context_id, "some")
    assert stored.error is not None
    assert (stored.status, stored.error.type, closed) == ("failed", "cancelled", [True])


def test_several_threads_may_share_it(client: SyncClient, context_id: str) -> None:
    """Each writes its own message at the same time."""

    def write(name: str) -> None:
        with client.produce(context_id, message_id=name) as message:
            for number in range(100):
                message.write(f"{name}{number} ")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    for name in "abcd":
        text = "".join(f"{name}{number} " for number in range(100))
        assert client.pull(context_id, name).content == text


def test_errors_are_those_of_the_client(client: SyncClient) -> None:
    """Refusals, nobody there, and use before it is entered."""
    with pytest.raises(ApiError) as caught:
        client.get_context("nowhere")
    assert caught.value.code == "context_not_found"
    with pytest.raises(ApiError), client.produce("nowhere"):
        raise AssertionError("not reached")
    with pytest.raises(UnreachableError), SyncClient("http://127.0.0.1:1") as nobody:
        nobody.get_context("c")
    with pytest.raises(RuntimeError, match="with SyncClient"):
        SyncClient("http://127.0.0.1:1").get_context("c")


def test_leaving_ends_its_thread(server: Server) -> None:
    """Also with an iterator that was not finished: the script can end."""
    before = set(threading.enumerate())
    with SyncClient(server.url) as client:
        context_id = client.create_context().id
        events = client.follow(context_id)
        next(events)
        assert set(threading.enumerate()) - before
        events.close()
    assert set(threading.enumerate()) <= before


def test_ctrl_c_ends_what_it_waits_for(
    server: Server, client: SyncClient, context_id: str, environment: dict[str, str]
) -> None:
    """A script that waits for events is interrupted: its message is failed, and it ends."""
    command = [sys.executable, "-c", INTERRUPTED, server.url, context_id]
    script = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "following\n"
    script.send_signal(signal.SIGINT)
    _, complaint = script.communicate(timeout=WAIT_S)
    assert complaint.rstrip().endswith("KeyboardInterrupt")
    stored = client.get_message(context_id, "m")
    assert stored.error is not None
    assert (stored.status, stored.error.type) == ("failed", "KeyboardInterrupt")
    assert client.pull(context_id, "m").content == "half"


class _InterruptedOnce(httpx.AsyncHTTPTransport):
    """Presses Ctrl-C when a message has been opened, just before the client hears of it."""

    pressed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.method == "PUT" and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return response


def test_ctrl_c_while_a_message_is_opened_leaves_no_producer_behind(
    server: Server, context_id: str
) -> None:
    """Nothing goes on saying that the producer lives, whether or not the opening had come through."""
    with SyncClient(server.url, transport=_InterruptedOnce()) as client:
        with pytest.raises(KeyboardInterrupt), client.produce(context_id):
            time.sleep(WAIT_S)
        assert client._portal is not None
        deadline = time.monotonic() + WAIT_S
        while tasks := client._portal.call(_producing_tasks):
            assert time.monotonic() < deadline, tasks
            time.sleep(0.001)


async def _producing_tasks() -> list[str]:
    return [str(task) for task in asyncio.all_tasks() if "ProducedMessage" in str(task)]
