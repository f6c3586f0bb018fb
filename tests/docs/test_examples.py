"""The examples in docs/examples run as their README says: in processes of their own, as a user would."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pages
import pytest
from provider import fake_chat
from serving import Server

from contextd.client import Client, StateChange, SyncClient, Text

EXAMPLES = pages.ROOT / "docs" / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
WAIT_S = 60  # a hang, not a measure

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    database = tmp_path_factory.mktemp("examples") / "contextd.db"
    with Server(database, settings={"scripted_rate": 0}) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[SyncClient]:
    with SyncClient(server.url) as client:
        yield client


@pytest.fixture
def start(server: Server, environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts an example in an empty folder, with the server's address in its environment."""
    with ExitStack() as stack:

        def run(name: str, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-u", EXAMPLES / name, *arguments],
                cwd=tmp_path,
                env={**environment, "NO_PROXY": "*", "CONTEXTD_URL": server.url, **environ},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield run


def ended(process: "subprocess.Popen[str]") -> str:
    """What it printed, when it has ended well."""
    printed, complaint = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, complaint
    assert complaint == ""
    return printed


def context_in(printed: str) -> str:
    """The id in `context ID`, its first line."""
    found = re.match(r"context (\S+)\n", printed)
    assert found
    return found[1]


def texts(client: SyncClient, context_id: str) -> list[tuple[str, str, str]]:
    """Role, status and text of each message."""
    messages = client.messages(context_id, content=True)
    return [(message.role, message.status, str(message.content)) for message in messages]


def test_every_example_is_described_and_tested() -> None:
    """A row in the README with a command that is there; a test below that starts it."""
    page = pages.text(EXAMPLES / "README.md")
    source = Path(__file__).read_text(encoding="utf-8")
    for name in FILES:
        assert f"[{name}]({name})" in page
        assert f"python {name} " in page
        assert f'("{name}", ' in source
    assert len(FILES) == 6


@pytest.mark.parametrize("name", FILES)
def test_every_example_says_how_it_is_used(start: Start, name: str) -> None:
    """`--help` names the address of the server."""
    assert "--url" in ended(start(name, "--help"))


def test_the_worker_goes_on_where_it_was_killed(start: Start, client: SyncClient) -> None:
    """Every line is stored once, and a third start finds nothing left to do."""
    killed = start("worker.py", "report.json", "--lines", "40")
    assert killed.stdout is not None
    context_id = context_in(killed.stdout.readline())
    assert killed.stdout.readline() == "from line 1 in epoch 1\n"
    with closing(client.follow(context_id)) as events:
        next(event for event in events if isinstance(event, Text) and event.sequence >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.wait(WAIT_S)
    stored = next(client.messages(context_id)).current_sequence
    printed = ended(start("worker.py", "report.json", "--lines", "40"))
    assert printed == f"context {context_id}\nfrom line {stored + 1} in epoch 2\ndone: 40 lines\n"
    report = "".join(f"Line {number} of 40.\n" for number in range(1, 41))
    assert texts(client, context_id) == [("assistant", "completed", report)]
    again = ended(start("worker.py", "report.json", "--lines", "40"))
    assert again == f"context {context_id}\ncompleted already, with 40 lines\n"


def test_the_reader_shows_everything_once(start: Start, client: SyncClient) -> None:
    """What was there, what comes, over a lost stream; it ends with the context."""
    context_id = client.create_context().id
    client.send(context_id, "Who is there?", respond=False)
    with client.produce(context_id) as message:
        message.write("Only ")
        message.flush()
        reading = start("reader_httpx.py", context_id)
        assert reading.stdout is not None
        assert reading.stdout.readline() == "user: Who is there?\n"
        message.write("me,\n")
        message.flush()
        assert reading.stdout.readline() == "assistant: Only me,\n"
        for number in range(200):
            message.write(f"{number} é😀\n")
    lines = [reading.stdout.readline() for _ in range(200)]
    assert lines == [f"{number} é😀\n" for number in range(200)]
    client.delete_context(context_id)
    assert ended(reading) == "\n[deleted]\n"


@pytest.mark.parametrize(
    ("script", "name", "end"),
    [("reader_httpx.py", "assistant: ", "\n[deleted]\n"), ("reader.py", "", "")],
)
def test_a_reader_comes_back_to_a_server_that_was_killed(
    start: Start, tmp_path: Path, script: str, name: str, end: str
) -> None:
    """Nothing is missing, nothing is shown twice."""
    database = tmp_path / "own.db"
    server = Server(database).start()
    try:
        with SyncClient(server.url) as client:
            context_id = client.create_context().id
            reading = start(script, context_id, "--url", server.url)
            assert reading.stdout is not None
            with client.produce(context_id) as message:
                message.write("before\n")
                assert reading.stdout.readline() == f"{name}before\n"
                message.write("and ")
                message.flush()
                server.kill()
                server = Server(database, port=server.port).start()
                message.write("after\n")
            assert reading.stdout.readline() == "and after\n"
            client.delete_context(context_id)
            printed, _ = reading.communicate(timeout=WAIT_S)
            assert (printed, reading.returncode) == (end, 0)
    finally:
        server.stop()


def test_an_external_tool_is_run(start: Start, client: SyncClient) -> None:
    """In every reply that calls it, also where the worker comes after the call."""
    context_id = str(uuid.uuid4())
    worker = start("external_tool.py", context_id)
    assert worker.stdout is not None
    assert context_in(worker.stdout.readline()) == context_id
    client.send(context_id, weather_script("Bonn", "Rome"))
    reach(client, context_id, "idle")
    worker.kill()
    worker.wait(WAIT_S)
    client.send(context_id, weather_script("Oslo"))
    reach(client, context_id, "awaiting_tool_results")
    start("external_tool.py", context_id)
    reach(client, context_id, "idle")
    results = [text for role, _, text in texts(client, context_id) if role == "tool"]
    assert results == [f"Rain in {city}, 7 degrees." for city in ("Bonn", "Rome", "Oslo")]


def weather_script(*cities: str) -> str:
    """A reply for each city, then an answer."""
    arguments = [{"city": city} for city in cities]
    calls = [{"tool_call": {"name": "get_weather", "arguments": each}} for each in arguments]
    return json.dumps({"script": [step for call in calls for step in (call, {"text": "And "})]})


def reach(client: SyncClient, context_id: str, state: str) -> None:
    for event in client.follow(context_id):
        if isinstance(event, StateChange) and event.state == state:
            return


async def test_the_openai_sdk_is_wrapped(
    start: Start, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream comes through, and question and answer are kept."""
    async with fake_chat.serving(fake_chat.FakeChat()) as chat, Client(server.url) as client:
        chat.play(fake_chat.text("Hel", "lo ", "there."))
        process = start("wrap_openai.py", "Hi", OPENAI_BASE_URL=chat.url, OPENAI_API_KEY="any")
        printed = await asyncio.to_thread(ended, process)
        context_id = context_in(printed)
        assert printed == f"context {context_id}\nHello there.\n"
        assert chat.bodies[0]["messages"] == [{"role": "user", "content": "Hi"}]
        kept = [message async for message in client.messages(context_id, content=True)]
        assert [(m.role, m.status, m.content) for m in kept] == [
            ("user", "completed", "Hi"),
            ("assistant", "completed", "Hello there."),
        ]
        assert kept[1].final_sequence == 3


def test_a_pydantic_ai_agent_is_wrapped(start: Start, client: SyncClient) -> None:
    """What it streams is printed and kept."""
    printed = ended(start("wrap_pydantic_ai.py", "What is there?"))
    context_id = context_in(printed)
    answer = printed.removeprefix(f"context {context_id}\n").removesuffix("\n")
    assert answer
    assert texts(client, context_id) == [
        ("user", "completed", "What is there?"),
        ("assistant", "completed", answer),
    ]
