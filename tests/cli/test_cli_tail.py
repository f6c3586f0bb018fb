"""`contextd tail`: everything, from the start if wanted, until the context is deleted."""

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from cli_parts import Ran, Screen, Served
from fake_wire import FakeContext

Command = tuple[list[str], dict[str, str]]


@pytest.fixture
def context(fake: Served) -> FakeContext:
    context = fake.add("c")
    fake.append(context, "u", "Hi", role="user")
    fake.close(context, "u")
    fake.append(context, "m", "One ", "two")
    return context


def read_events(process: "subprocess.Popen[bytes]", until: str) -> list[dict[str, Any]]:
    assert process.stdout
    events = []
    while not events or events[-1]["type"] != until:
        events.append(json.loads(process.stdout.readline()))
    return events


def test_from_start_repeats_nothing_and_misses_nothing(
    fake: Served, context: FakeContext, command: Command
) -> None:
    """What was there, then what comes: each chunk once."""
    fake.page_limit = fake.page_chunks_max = 1
    process = subprocess.Popen(
        [*command[0], "tail", "c", "--json", "--from-start"],
        env=command[1],
        stdout=subprocess.PIPE,
    )
    events = read_events(process, "current")
    fake.do(lambda: fake.append(context, "m", " three"))
    fake.do(lambda: fake.close(context, "m"))
    events += read_events(process, "closed")
    fake.do(lambda: fake.delete(context))
    events += read_events(process, "state")
    assert fake.streams == ["f-4"]  # the list's cursor, with which nothing is missed
    texts = [(e["message_id"], e["content"]) for e in events if e["type"] == "text"]
    assert texts == [("u", "Hi"), ("m", "One two"), ("m", " three")]
    assert [e["message_id"] for e in events if e["type"] == "closed"] == ["u", "m"]
    assert events[-1]["state"] == "deleted"
    assert process.wait(10) == 0


def test_ctrl_c_ends_it(context: FakeContext, command: Command) -> None:
    """Quietly, with 130."""
    process = subprocess.Popen(
        [*command[0], "tail", "c", "--json"],
        env=command[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    read_events(process, "current")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err.strip()) == (130, b"")


def test_people_see_headers_texts_and_states(
    fake: Served, context: FakeContext, on_screen: Callable[..., Screen]
) -> None:
    """A header where another message goes on; states, ends and lost connections between them."""
    screen = on_screen("tail", "c", "--from-start", NO_COLOR="1", TERM="dumb")
    screen.read_until(b"idle")
    fake.do(lambda: fake.append(context, "n", "\x1bhm\n", kind="thinking"))
    screen.read_until(b"hm")
    fake.do(lambda: fake.append(context, "m", " three"))
    fake.do(lambda: fake.close(context, "m", "failed"))
    screen.read_until(b"failed: m")
    fake.do(lambda: fake.disconnect(context))
    screen.read_until(b"connection lost")
    fake.wait(lambda: len(fake.streams) == 2)
    fake.do(lambda: fake.delete(context))
    seen = screen.read_to_end().replace("\r\n", "\n")
    assert "── user text u\nHi\n── assistant text m\nOne two\n· idle\n" in seen
    assert "── assistant thinking n\n␛hm\n── assistant text m\n three\n· failed: m\n" in seen
    assert "· connection lost (the server ended the stream), trying again\n" in seen
    assert screen.process.returncode in {0, 1}  # 1: deleted before it was attached again


def test_an_unknown_context_is_an_error(contextd: Callable[..., Ran]) -> None:
    """One line, exit code 1, and no waiting."""
    ran = contextd("tail", "nowhere")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err == "contextd: There is no such context here. (context_not_found)\n"
