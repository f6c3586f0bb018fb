"""§13 at the wire: what the scripted provider answers, seen through messages and chunks."""

import json
import time
from typing import Any

import pytest
from wire import Api, Json, script, until


def written(api: Api, context_id: str, *steps: Json) -> list[tuple[str, list[str]]]:
    """Kind and chunks of each message that a script writes."""
    answer, turn = api.run(context_id, script(*steps))
    assert turn["status"] == "completed", turn
    return [
        (message["kind"], api.texts(context_id, message["id"]))
        for message in api.replies(context_id, answer["turn_id"])
    ]


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("Hello", ["You ", "said: ", "Hello"]),
        ("a  b\n\nc ", ["You ", "said: ", "a  ", "b\n\n", "c "]),
        ("  x", ["You ", "said:   ", "x"]),
        ("🦊 ü", ["You ", "said: ", "🦊 ", "ü"]),
    ],
)
def test_a_plain_text_is_said_back_a_chunk_a_word(
    api: Api, context_id: str, text: str, chunks: list[str]
) -> None:
    """A run of non-space with the white space after it."""
    message = api.reply(context_id, text)
    assert api.texts(context_id, message["id"]) == chunks


def test_steps_run_in_order(api: Api, context_id: str) -> None:
    """text, chunks, repeat, delay and rate make one message; thinking one of its own kind."""
    assert written(
        api,
        context_id,
        {"thinking": "let me see"},
        {"text": "one two "},
        {"chunks": ["th", "re", "e ", " "]},
        {"delay_ms": 1},
        {"rate": 1000},
        {"repeat": 3, "text": "ha "},
    ) == [
        ("thinking", ["let ", "me ", "see"]),
        ("text", ["one ", "two ", "th", "re", "e ", " ", "ha ", "ha ", "ha "]),
    ]


def test_text_after_thinking_after_text(api: Api, context_id: str) -> None:
    """Joined by kind in the order of writing, nothing is lost or mixed."""
    found = written(api, context_id, {"text": "a"}, {"thinking": "b"}, {"text": "c"})
    assert [kind for kind, _ in found] == ["text", "thinking", "text"]
    assert [chunks for _, chunks in found] == [["a"], ["b"], ["c"]]


def test_usage_is_reported(api: Api, context_id: str) -> None:
    """Of the turn and of its last message."""
    usage = {"prompt_tokens": 12, "completion_tokens": 34}
    answer, turn = api.run(context_id, script({"text": "x"}, {"usage": usage}))
    assert turn["usage"] == usage
    assert api.replies(context_id, answer["turn_id"])[-1]["usage"] == usage


@pytest.mark.parametrize("size", [16_000, 20_000, 65_536])
def test_a_chunk_up_to_the_limit_is_one_chunk(api: Api, context_id: str, size: int) -> None:
    """`chunks` are exactly these: only beyond 64 KiB of UTF-8 (§7) may one be divided."""
    (only,) = written(api, context_id, {"chunks": ["x" * size, "y"]})
    assert [len(chunk) for chunk in only[1]] == [size, 1]


def test_a_chunk_above_the_limit_is_divided(api: Api, context_id: str) -> None:
    """No stored chunk is above 64 KiB of UTF-8, and the text is whole."""
    text = "ä" * 50_000
    ((_, chunks),) = written(api, context_id, {"chunks": [text]})
    assert "".join(chunks) == text
    assert max(len(chunk.encode()) for chunk in chunks) <= 65_536


def test_a_nul_of_the_model_is_replaced(api: Api, context_id: str) -> None:
    """U+0000 is stored as U+FFFD (§3.1)."""
    ((_, chunks),) = written(api, context_id, {"chunks": ["a\u0000b"]})
    assert chunks == ["a\ufffdb"]


def test_a_script_that_cannot_be_played_fails_its_turn(api: Api, context_id: str) -> None:
    """It is a turn's error, never a defect of the server or a turn that hangs."""
    scripts: list[Any] = [
        [{"dance": 1}],
        [5],
        [{"repeat": "x", "text": "a"}],
        [{"error": "odd"}],
        [{"delay_ms": -1}],
        [{"text": 5}],
    ]
    for steps in scripts:
        _, turn = api.run(context_id, json.dumps({"script": steps}))
        assert (turn["status"], turn["attempt"]) == ("failed", 1), steps
        assert turn["error"]["type"] != "internal_error", steps


def test_the_rate_bounds_how_fast_it_writes(api: Api, context_id: str) -> None:
    """20 chunks at 100 a second take 0.19 s at least: a lower bound holds on any machine."""
    started = time.monotonic()
    api.run(context_id, script({"rate": 100}, {"repeat": 20, "text": "x"}))
    assert time.monotonic() - started >= 0.18


def test_the_default_is_fifty_chunks_a_second(patient: Api) -> None:
    """Without a setting: 11 chunks are 10 intervals, 0.2 s at least; `rate` 0 is without a wait."""
    context_id = patient.create()
    started = time.monotonic()
    message = patient.reply(context_id, script({"repeat": 11, "text": "x"}))
    assert time.monotonic() - started >= 0.19
    assert message["stats"]["mean_interval_ms"] >= 10
    quick = patient.reply(context_id, script({"rate": 0}, {"repeat": 10_000, "text": "x"}))
    assert quick["stats"]["mean_interval_ms"] < 10


def test_a_history_does_not_disturb_the_script(api: Api, context_id: str) -> None:
    """The newest user's message is answered, whatever was said before."""
    api.run(context_id, script({"text": "one"}))
    api.send(context_id, "a note", respond=False)
    assert api.text(context_id, api.reply(context_id, "two")["id"]) == "You said: two"


def test_many_contexts_at_once(api: Api) -> None:
    """Turns run beside one another, and each answers its own."""
    contexts = [api.create() for _ in range(40)]
    turns = {id_: api.send(id_, f"I am {id_}")["turn_id"] for id_ in contexts}
    for id_, turn_id in turns.items():
        api.ended(id_, turn_id)
        (reply,) = api.replies(id_, turn_id)
        assert api.text(id_, reply["id"]) == f"You said: I am {id_}"
    until(lambda: all(api.context(id_)["state"] == "idle" for id_ in contexts))
