"""§6 at the wire: what becomes of answers that model's servers cut off, hold back or refuse."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from tooling import Chat, Place, ToolApi, outcomes, serving_tools
from wire import Json

TOKEN_S, ALIVE_S = 1.0, 2.5
PAUSE_S = 0.05  # between two signs of life
LONG = "word " * 200

Write = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(scope="module")
def api(
    make_server: Any, tmp_path_factory: pytest.TempPathFactory, model: Chat
) -> Iterator[ToolApi]:
    """A server with little patience, two attempts, and the model."""
    settings = {
        "token_timeout_s": TOKEN_S,
        "keep_alive_timeout_s": ALIVE_S,
        "attempts_max": 2,
        **model.settings,
    }
    folder: Path = tmp_path_factory.mktemp("workspace")
    with serving_tools(make_server, folder, **settings) as client:
        yield client


def begin(handler: BaseHTTPRequestHandler, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    handler.send_header(
        "content-type", "text/event-stream" if status == 200 else "application/json"
    )
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def event(handler: BaseHTTPRequestHandler, payload: Json) -> None:
    handler.wfile.write(f"data: {json.dumps(payload)}\n\n".encode())
    handler.wfile.flush()


def choice(finish_reason: str | None, **delta: Any) -> Json:
    return {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def calls_and(place: Place, last: Json) -> Write:
    """An answer with a call that is whole and one that is not, which then ends in `last`."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        whole = json.dumps({"path": place.runs, "line": "whole"})
        for index, arguments in enumerate((whole, whole[:-5])):
            function = {"name": "note", "arguments": arguments}
            part = {"index": index, "id": f"c{index}", "type": "function", "function": function}
            event(handler, choice(None, tool_calls=[part]))
        event(handler, last)

    return write


def refusal(status: int, message: str, code: str = "", **headers: str) -> Write:
    def write(handler: BaseHTTPRequestHandler) -> None:
        begin(handler, status, **headers)
        error = {"message": message, "type": "invalid_request_error", "code": code}
        handler.wfile.write(json.dumps({"error": error}).encode())

    return write


def alive(wait_s: float, *last: Json) -> Write:
    """Signs of life for so long, or until nobody listens any more, then `last`."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        ends_at = time.monotonic() + wait_s
        try:
            while time.monotonic() < ends_at:
                handler.wfile.write(b": keep-alive\n\n")
                handler.wfile.flush()
                event(handler, choice(None, content=""))
                time.sleep(PAUSE_S)
            for payload in last:
                event(handler, payload)
        except OSError:
            pass  # the client has gone

    return write


# Answers that were not finished


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_calls_of_an_answer_that_was_stopped(
    api: ToolApi, chat: Chat, place: Place, reason: str
) -> None:
    """None runs, each has a result that says so, and the turn is over and says why."""
    context_id = api.create(provider="openai", tools=["note"])
    chat.replies = [calls_and(place, choice(reason)), "well"]
    _, turn = api.run(context_id, "go")
    assert (turn["status"], turn["finish_reason"]) == ("completed", reason)
    found = api.calls(context_id)
    assert outcomes(found) == [("note", "failed", "cut_off")] * 2
    assert all(reason in api.result(context_id, one) for one in found)
    assert place.lines() == []
    api.run(context_id, "on")
    told = chat.requests[-1]["messages"]
    assert [m["role"] for m in told] == ["user", "assistant", "tool", "tool", "user"]


@pytest.mark.parametrize(
    "last",
    [
        {"error": {"message": "upstream went away", "code": 502}},
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {},
                    "finish_reason": "error",
                    "error": {"message": "upstream went away", "code": 502},
                }
            ]
        },
    ],
    ids=["by itself", "in the choice"],
)
def test_calls_of_an_answer_that_broke(api: ToolApi, chat: Chat, place: Place, last: Json) -> None:
    """They leave with their attempt: nothing runs, and the next attempt's answer counts."""
    context_id = api.create(provider="openai", tools=["note"])
    chat.replies = [calls_and(place, last), "well"]
    _, turn = api.run(context_id, "go")
    assert (turn["status"], turn["attempt"]) == ("completed", 2)
    (broken,) = [e for e in api.journal(context_id) if e["trigger"] == "fail_transiently"]
    assert "upstream went away" in broken["detail"]["error"]["message"]
    assert api.calls(context_id) == []
    assert place.lines() == []
    contents = [m["content"] for m in api.messages(context_id, include="content")]
    assert contents == ["go", "well"]


# Waiting


def test_a_wait_beyond_the_turns_time_fails_at_once(api: ToolApi, chat: Chat) -> None:
    """With the server's words: nobody is kept waiting for what cannot come."""
    context_id = api.create(provider="openai", tools=[])
    chat.replies = [refusal(429, "The daily limit is reached.", retry_after="3000")]
    _, turn = api.run(context_id, "go")
    assert (turn["status"], turn["attempt"]) == ("failed", 1)
    assert turn["error"]["type"] == "provider_rate_limited"
    assert "The daily limit is reached." in turn["error"]["message"]
    assert len(chat.requests) == 1


def test_signs_of_life_put_off_the_end(api: ToolApi, chat: Chat) -> None:
    """Longer than a silence may last: the late answer counts, in its first attempt."""
    context_id = api.create(provider="openai", tools=[])
    chat.replies = [alive(1.5 * TOKEN_S, choice(None, content="late"), choice("stop"))]
    _, turn = api.run(context_id, "go")
    assert (turn["status"], turn["attempt"]) == ("completed", 1)
    assert api.text(context_id, api.replies(context_id, turn["id"])[0]["id"]) == "late"


def test_signs_of_life_have_a_limit(api: ToolApi, chat: Chat) -> None:
    """Then the attempt has broken, and its error says what was waited for."""
    context_id = api.create(provider="openai", tools=[])
    chat.replies = [alive(60), "well"]
    _, turn = api.run(context_id, "go")
    assert (turn["status"], turn["attempt"]) == ("completed", 2)
    (broken,) = [e for e in api.journal(context_id) if e["trigger"] == "fail_transiently"]
    error = broken["detail"]["error"]
    assert error["type"] == "provider_timeout"
    assert "signs of life" in error["message"]


# What a model does not take


TOO_LONG = refusal(400, "The prompt is too long for this model.", "context_length_exceeded")


def test_a_conversation_that_outgrows_the_model_goes_on(api: ToolApi, chat: Chat) -> None:
    """The oldest turns are left out, it is asked once more, and the turn says what was left out."""
    context_id = api.create(provider="openai", model="small", tools=[])
    chat.replies = ["one", "two", "three", TOO_LONG, "four"]
    for number in range(3):
        api.run(context_id, f"question {number}. {LONG}")
    _, turn = api.run(context_id, "the last question")
    assert (turn["status"], turn["attempt"]) == ("completed", 1)
    refused, taken = chat.requests[3:]
    assert taken["messages"] == refused["messages"][2 * turn["left_out"]["turns"] :]
    assert turn["left_out"]["turns"] > 0
    assert turn["left_out"]["messages"] == 2 * turn["left_out"]["turns"]
    assert taken["messages"][-1]["content"] == "the last question"
    chat.replies = ["five"]  # what the model takes is known now
    assert api.run(context_id, "and now?")[1]["left_out"]["turns"] > 0


@pytest.mark.parametrize("before", [0, 2])
def test_what_is_left_is_too_long_as_well(api: ToolApi, chat: Chat, before: int) -> None:
    """The turn fails with the server's words, and names the setting that would bound it."""
    context_id = api.create(provider="openai", model=f"tiny-{before}", tools=[])
    chat.replies = ["fine"] * before
    for number in range(before):
        api.run(context_id, f"question {number}. {LONG}")
    chat.replies = [TOO_LONG, TOO_LONG]
    _, turn = api.run(context_id, "the last question")
    assert (turn["status"], turn["attempt"]) == ("failed", 1)
    assert turn["error"]["type"] == "input_too_long"
    assert "The prompt is too long for this model." in turn["error"]["message"]
    assert "CONTEXTD_CONTEXT_TOKENS_MAX" in turn["error"]["message"]
    assert len(chat.requests) == before + (2 if before else 1)
    assert ("left_out" in turn) == bool(before)
