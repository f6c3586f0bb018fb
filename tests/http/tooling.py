"""What the tests of tools share: scripts with calls, the routes of §8, and servers with tools."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server
from wire import Api, Json, ok, script, until

TOOL_CALL_FIELDS = {
    "id", "context_id", "turn_id", "message_id", "name", "arguments", "status",
    "requires_approval", "result_message_id", "error", "duration_ms", "created_at", "decided_at",
}  # fmt: skip
CALL_STATUSES = (
    "pending", "approved", "denied", "running", "succeeded", "failed", "timed_out", "cancelled",
)  # fmt: skip
BUILT_IN = ["read_file", "list_directory", "write_file"]
# The way of a turn with one round of calls, by its triggers.
ECHO_PATH = [
    "receive_message", "request_llm", "first_chunk", "end_stream", "execute_tools",
    "collect_results", "request_llm", "first_chunk", "end_stream", "finish",
]  # fmt: skip

ASK: Json = {
    "name": "ask",
    "description": "Asks somebody.",
    "parameters": {
        "type": "object",
        "properties": {"question": {"type": "string"}},
        "required": ["question"],
        "additionalProperties": False,
    },
    "external": True,
}


def external(name: str, **more: Any) -> Json:
    """A declaration of an external tool that takes one text, `question`."""
    return {**ASK, "name": name, **more}


def call(name: str, /, **arguments: Any) -> Json:
    """A step of a script: the model calls a tool."""
    return {"tool_call": {"name": name, "arguments": arguments}}


def ask(question: str = "why", name: str = "ask") -> Json:
    """A call of an external tool."""
    return call(name, question=question)


def verdict(call_id: str, decision: str, **more: Any) -> Json:
    """One decision."""
    return {"tool_call_id": call_id, "decision": decision, **more}


class ToolApi(Api):
    """The routes of §8 besides the others."""

    def calls(self, context_id: str, **params: Any) -> list[Json]:
        """All calls, oldest first."""
        return self.walk(f"/contexts/{context_id}/tool-calls", **params)

    def call_named(self, context_id: str, name: str) -> Json:
        (found,) = [item for item in self.calls(context_id) if item["name"] == name]
        return found

    def post_decisions(self, context_id: str, *decisions: Json) -> httpx.Response:
        path = f"/contexts/{context_id}/tool-calls/decisions"
        return self.http.post(path, json={"decisions": list(decisions)})

    def decide(self, context_id: str, *decisions: Json) -> Json:
        return ok(self.post_decisions(context_id, *decisions), 202)

    def decide_all(self, context_id: str, decision: str, **more: Any) -> Json:
        """Says the same to every call that waits."""
        ids = self.context(context_id)["pending_tool_calls"]
        return self.decide(context_id, *(verdict(id_, decision, **more) for id_ in ids))

    def post_result(self, context_id: str, call_id: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/contexts/{context_id}/tool-calls/{call_id}/result", json=body)

    def answer(self, context_id: str, call_id: str, content: str = "42", **more: Any) -> Json:
        return ok(self.post_result(context_id, call_id, content=content, **more), 202)

    def steps(self, context_id: str) -> list[str]:
        """The journal's triggers, oldest first."""
        return [entry["trigger"] for entry in self.journal(context_id)]

    def waiting(self, context_id: str, *steps: Json, state: str) -> tuple[str, list[Json]]:
        """Sends a script and waits until the context stands in `state`: the turn and its calls."""
        turn_id = self.send(context_id, script(*steps))["turn_id"]
        self.in_state(context_id, state)
        return turn_id, [one for one in self.calls(context_id) if one["turn_id"] == turn_id]

    def pending(self, context_id: str, *steps: Json) -> tuple[str, list[Json]]:
        return self.waiting(context_id, *steps, state="awaiting_tool_approval")

    def asked(self, context_id: str, *steps: Json) -> tuple[str, list[Json]]:
        return self.waiting(context_id, *steps, state="awaiting_tool_results")

    def played(self, context_id: str, *steps: Json) -> tuple[Json, list[Json]]:
        """Plays a script to the turn's end: the turn, and its calls."""
        _, turn = self.run(context_id, script(*steps))
        return turn, [one for one in self.calls(context_id) if one["turn_id"] == turn["id"]]

    def result(self, context_id: str, tool_call: Json) -> str:
        """The text of a call's result."""
        assert tool_call["result_message_id"] is not None, tool_call
        return self.text(context_id, tool_call["result_message_id"])


def outcomes(calls: Sequence[Json]) -> list[tuple[str, str, str | None]]:
    """Name, status and error of each."""
    return [(one["name"], one["status"], one["error"]) for one in calls]


@contextmanager
def serving_tools(make_server: Any, folder: Path, **settings: Any) -> Iterator[ToolApi]:
    """A client of a server that has the built-in tools, on `folder`, and those of `user_tools`."""
    client = ToolApi(start_with_tools(make_server, workspace=folder, **settings).url)
    try:
        yield client
    finally:
        client.close()


def start_with_tools(make: Callable[..., Server], **settings: Any) -> Server:
    """What `make` starts, able to import `user_tools`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        return make(tools="user_tools", **settings)


class Place:
    """A folder where the tests and a server's tools meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def runs(self) -> str:
        """The file in which a tool notes its runs."""
        return str(self.folder / "runs")

    @property
    def gate(self) -> str:
        """The file that a tool waits for."""
        return str(self.folder / "gate")

    def lines(self) -> list[str]:
        """What was noted so far."""
        path = Path(self.runs)
        return path.read_text().splitlines() if path.exists() else []

    def began(self, times: int = 1) -> None:
        """Waits until a tool has begun that often."""
        until(lambda: self.lines().count("began") == times, "the tool's start")

    def open(self) -> None:
        """Lets the tool go on."""
        Path(self.gate).touch()

    def holding(self, name: str = "hold") -> Json:
        """A call that runs until the gate opens."""
        return call(name, path=self.runs, until=self.gate)


def guarded(place: Place, line: str = "ran") -> Json:
    """A call that waits for a person, and is seen in a file when it runs."""
    return call("guarded", path=place.runs, line=line)


Reply = str | int | list[tuple[str, str]] | Callable[[BaseHTTPRequestHandler], None]
REFUSAL = b'{"error": {"message": "The model refused."}}'


class Chat:
    """A Chat Completions server on loopback that records what it is sent (§6, `openai`).

    Each request takes the next of `replies`: a text, a list of (name, arguments as text), a status
    that refuses it, or a function that writes the answer.
    """

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[Json] = []
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                chat.requests.append(json.loads(self.rfile.read(size)))
                reply = chat.replies.pop(0)
                if callable(reply):
                    self.close_connection = True
                    reply(self)
                    return
                if isinstance(reply, int):
                    status, media_type, body = reply, "application/json", REFUSAL
                else:
                    status, media_type = 200, "text/event-stream"
                    body = b"".join(chat.events(reply))
                self.send_response(status)
                self.send_header("content-type", media_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
                """Nothing: the tests' output is theirs."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def settings(self) -> Json:
        """Of a contextd that asks this model."""
        return {"openai_base_url": self.url, "openai_api_key": "none", "model": "fake"}

    @contextmanager
    def serving(self) -> Iterator["Chat"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()

    @staticmethod
    def events(reply: str | list[tuple[str, str]]) -> Iterator[bytes]:
        if isinstance(reply, str):
            deltas: list[Json] = [{"content": reply}]
        else:
            deltas = [
                {
                    "tool_calls": [
                        {
                            "index": index,
                            "id": f"call-{index}",
                            "type": "function",
                            "function": {"name": name, "arguments": arguments},
                        }
                    ]
                }
                for index, (name, arguments) in enumerate(reply)
            ]
        reason = "stop" if isinstance(reply, str) else "tool_calls"
        for delta, finish in [*((delta, None) for delta in deltas), ({}, reason)]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield f"data: {json.dumps({'id': 'c', 'choices': [choice]})}\n\n".encode()
        yield b"data: [DONE]\n\n"


def at_once(*works: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """Does them as nearly at the same time as threads can; the answers in the order of `works`."""
    barrier = threading.Barrier(len(works))
    answers: list[httpx.Response | None] = [None] * len(works)

    def go(index: int) -> None:
        barrier.wait()
        answers[index] = works[index]()

    threads = [threading.Thread(target=go, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if answer is not None]
