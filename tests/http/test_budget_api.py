"""§6 at the wire: the budget of tokens, what is left out of it, usage, and the metrics of both."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tooling import Chat, Place, ToolApi, ask, call, external, serving_tools
from wire import Json, ok, script

BUDGET_TOKENS = 400
LONG = "word " * 120  # some 120 tokens, however they are counted
HUGE = "word " * 1000


class Counting(Chat):
    """A model that says with each answer how many tokens it took: the next of `counts`, if any."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[int, int]] = []

    def events(self, reply: str | list[tuple[str, str]]) -> Iterator[bytes]:  # type: ignore[override]
        *events, done = super().events(reply)
        yield from events
        if self.counts:
            prompt, completion = self.counts.pop(0)
            usage = {"prompt_tokens": prompt, "completion_tokens": completion}
            data = {
                "id": "c",
                "choices": [],
                "usage": {**usage, "total_tokens": sum(usage.values())},
            }
            yield f"data: {json.dumps(data)}\n\n".encode()
        yield done


@pytest.fixture(scope="module")
def model() -> Iterator[Counting]:
    with Counting().serving() as model:
        assert isinstance(model, Counting)
        yield model


@pytest.fixture
def chat(model: Counting) -> Counting:
    """The model, before it is asked anything."""
    model.requests.clear()
    model.replies.clear()
    model.counts.clear()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def tight(make_server: Any, folder: Path, model: Chat) -> Iterator[ToolApi]:
    """A server with a small budget and little time for a tool."""
    settings = {"context_tokens_max": BUDGET_TOKENS, "tool_timeout_s": 0.2, **model.settings}
    with serving_tools(make_server, folder, **settings) as client:
        yield client


@pytest.fixture
def asking(tight: ToolApi) -> str:
    """A context that asks the model."""
    return tight.create(provider="openai", tools=["echo", "refuse"])


def sent(request: Json) -> str:
    """All that was sent in one request, calls too, as one text."""
    return json.dumps(request["messages"], ensure_ascii=False)


def echo(text: str) -> tuple[str, str]:
    """A call as the model writes it."""
    return "echo", json.dumps({"text": text})


def left_out(turn: Json) -> tuple[int, int]:
    """How many turns and messages the model was not shown."""
    told = turn.get("left_out", {"turns": 0, "messages": 0})
    return told["turns"], told["messages"]


def check_well_formed(messages: list[Json]) -> None:
    """Each call is followed by its one result, and no result is without its call."""
    open_calls: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] in open_calls, messages
            open_calls.remove(message["tool_call_id"])
            continue
        assert open_calls == [], messages
        open_calls = [one["id"] for one in message.get("tool_calls", [])]
    assert open_calls == [], messages


# The budget


def test_what_fits_is_sent_whole(tight: ToolApi, asking: str, chat: Counting) -> None:
    """And nothing is said of what was left out."""
    chat.replies += ["first answer", "second answer", "third answer"]
    turns = [tight.run(asking, f"question {n}")[1] for n in range(3)]
    assert [message["content"] for message in chat.requests[2]["messages"]] == [
        "question 0", "first answer", "question 1", "second answer", "question 2",
    ]  # fmt: skip
    assert all("left_out" not in turn for turn in turns)


def test_older_turns_are_left_out_whole(tight: ToolApi, asking: str, chat: Counting) -> None:
    """From the oldest, question and answer together; the turn says how many."""
    chat.replies += [f"answer {n} {LONG}" for n in range(5)]
    for n in range(5):
        _, turn = tight.run(asking, f"question {n}")
        text = sent(chat.requests[n])
        shown = [k for k in range(n + 1) if f"question {k}" in text]
        assert shown == list(range(shown[0], n + 1))
        assert [k for k in range(n) if f"answer {k} " in text] == shown[:-1]
        gone = n + 1 - len(shown)
        assert left_out(turn) == (gone, 2 * gone)
        assert ("left_out" in turn) == (gone > 0)
        if gone:  # an answer each of some 120 tokens
            assert 100 * gone < turn["left_out"]["tokens"] < 200 * gone
    assert 1 <= gone < 4
    listed = ok(tight.http.get(f"/contexts/{asking}/turns"))["items"]
    assert listed[-1]["left_out"] == turn["left_out"]
    assert len(tight.messages(asking)) == 10


def test_the_newest_is_kept(tight: ToolApi, asking: str, chat: Counting) -> None:
    """Also where it does not fit by itself."""
    chat.replies += ["fine", "also fine"]
    tight.run(asking, "a small question")
    _, turn = tight.run(asking, HUGE)
    assert turn["status"] == "completed"
    assert left_out(turn) == (1, 2)
    assert [message["content"] for message in chat.requests[1]["messages"]] == [HUGE]


def test_the_tools_take_room(tight: ToolApi, chat: Counting) -> None:
    """What the model is offered is sent with each request, so it counts."""
    shown = []
    for tools in ([], [external("ask", description="word " * 300)]):
        context_id = tight.create(provider="openai", tools=tools)
        chat.replies += [f"one {LONG}", "two"]
        tight.run(context_id, "question 0")
        _, turn = tight.run(context_id, "question 1")
        shown.append(left_out(turn))
    assert shown == [(0, 0), (1, 2)]


def test_the_system_prompt_is_kept(tight: ToolApi, chat: Counting) -> None:
    """It goes first, and takes its part of the budget."""
    context_id = tight.create(provider="openai", tools=[], system_prompt=f"Be brief. {HUGE}")
    chat.replies += ["fine", "also fine"]
    tight.run(context_id, "a small question")
    _, turn = tight.run(context_id, "another")
    assert left_out(turn) == (1, 2)
    roles = [message["role"] for message in chat.requests[1]["messages"]]
    assert roles == ["system", "user"]
    assert chat.requests[1]["messages"][0]["content"].startswith("Be brief.")


def test_the_answer_itself_is_not_cut(tight: ToolApi) -> None:
    """The scripted provider plays its script, however long."""
    context_id = tight.create()
    message = tight.reply(context_id, HUGE)
    assert tight.text(context_id, message["id"]) == f"You said: {HUGE}"


def test_calls_are_not_separated_from_results(tight: ToolApi, asking: str, chat: Counting) -> None:
    """Wherever the cut is: a turn with calls is there with all of them, or not at all."""
    for n in range(8):
        words = "word " * (10 + 13 * n)
        rounds = [[echo(f"call {n}a {words}"), echo(f"call {n}b")], [echo(f"call {n}c")]]
        chat.replies += [*rounds, f"answer {n}."]
        before = len(chat.requests)
        _, turn = tight.run(asking, f"question {n}.")
        assert turn["status"] == "completed"
        assert len(chat.requests) == before + 3
    for index, request in enumerate(chat.requests):
        newest, round_ = divmod(index, 3)
        check_well_formed(request["messages"])
        text = sent(request)
        shown = [n for n in range(newest + 1) if f"question {n}." in text]
        assert shown == list(range(shown[0], newest + 1))
        marks = [f"call {n}{which}" for n in range(newest) for which in "abc"]
        marks += [f"answer {n}." for n in range(newest)]
        marks += [f"call {newest}{which}" for which in ["", "ab", "abc"][round_]]
        assert [mark for mark in marks if mark in text] == [
            mark for mark in marks if int(mark.split()[1][0]) in shown
        ]
    assert turn["left_out"]["turns"] > 0
    # What was sent of a turn with two rounds: question, two calls, a call, their results, answer.
    assert turn["left_out"]["messages"] == 8 * turn["left_out"]["turns"]


def test_a_turn_that_grows_beyond_the_budget(tight: ToolApi, asking: str, chat: Counting) -> None:
    """It pushes out older ones from round to round, and keeps its own question and calls."""
    chat.replies += ["the first answer", [echo(f"small {LONG}")], [echo(f"large {HUGE}")], "end"]
    tight.run(asking, f"the first question {'word ' * 40}")
    _, turn = tight.run(asking, "the second question")
    _, first, second, third = map(sent, chat.requests)
    assert "the first question" in first
    assert "the first question" not in third
    assert all("the second question" in text for text in (first, second, third))
    assert "small word" in third
    assert "large word" in third
    check_well_formed(chat.requests[3]["messages"])
    assert left_out(turn) == (1, 2)


def test_a_retried_turn_keeps_its_question(tight: ToolApi, chat: Counting) -> None:
    """The question belongs to the turn that answers it, whichever attempt at it that is."""
    context_id = tight.create(tools=["echo"])
    question = json.dumps({"script": [{"text": LONG}, {"error": "fatal"}]})
    _, turn = tight.run(context_id, question)
    assert turn["status"] == "failed"
    ok(tight.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    chat.replies += [[echo(HUGE)], "end"]
    again = ok(tight.http.post(f"/contexts/{context_id}/retry"), 202)
    assert tight.ended(context_id, again["turn_id"])["status"] == "completed"
    for request in chat.requests:
        check_well_formed(request["messages"])
        assert request["messages"][0] == {"role": "user", "content": question}


def test_a_note_in_the_midst_of_a_turn(tight: ToolApi, chat: Counting) -> None:
    """A message that is stored while tools are at work does not make an old turn of the newest."""
    context_id = tight.create(provider="openai", tools=[external("ask")])
    chat.replies += [[("ask", '{"question": "why"}')], "end"]
    turn_id = tight.send(context_id, f"The question: {HUGE}")["turn_id"]
    tight.in_state(context_id, "awaiting_tool_results")
    tight.send(context_id, "a note", respond=False)
    (found,) = tight.calls(context_id)
    tight.answer(context_id, found["id"], "because")
    assert tight.ended(context_id, turn_id)["status"] == "completed"
    text = sent(chat.requests[1])
    check_well_formed(chat.requests[1]["messages"])
    assert "The question: " in text
    assert "because" in text


# Usage


def test_usage_is_summed_over_rounds(tight: ToolApi, asking: str, chat: Counting) -> None:
    """Of a turn and of the context; each answer has its own on its last message."""
    assert "usage" not in tight.context(asking)
    chat.replies += [[echo("a"), echo("b")], [echo("c")], "end", "another end"]
    chat.counts += [(10, 1), (20, 2), (30, 3), (400, 40)]
    _, turn = tight.run(asking, "go")
    assert turn["usage"] == {"prompt_tokens": 60, "completion_tokens": 6}
    written = tight.replies(asking, turn["id"])
    assert [one["usage"] and one["usage"]["prompt_tokens"] for one in written] == [
        None, 10, None, None, 20, None, 30,
    ]  # fmt: skip
    assert tight.context(asking)["usage"] == turn["usage"]
    _, turn = tight.run(asking, "and again")
    assert turn["usage"] == {"prompt_tokens": 400, "completion_tokens": 40}
    assert tight.context(asking)["usage"] == {"prompt_tokens": 460, "completion_tokens": 46}


def test_usage_of_broken_attempts_counts(tight: ToolApi) -> None:
    """It was paid for."""
    context_id = tight.create()
    counted = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    steps = script(counted, {"text": "a "}, {"error": "transient", "times": 2}, {"text": "b"})
    _, turn = tight.run(context_id, steps)
    assert (turn["status"], turn["attempt"]) == ("completed", 3)
    assert turn["usage"] == {"prompt_tokens": 15, "completion_tokens": 6}
    _, turn = tight.run(context_id, script(counted, {"text": "a "}, {"error": "fatal"}))
    assert turn["status"] == "failed"
    assert turn["usage"] == {"prompt_tokens": 5, "completion_tokens": 2}
    assert tight.context(context_id)["usage"] == {"prompt_tokens": 20, "completion_tokens": 8}


def test_usage_that_nobody_counted(tight: ToolApi, asking: str, chat: Counting) -> None:
    """Is null, and a round without it does not spoil the sum."""
    chat.replies += ["end", [echo("a")], "end"]
    _, turn = tight.run(asking, "go")
    assert turn["usage"] is None
    assert "usage" not in tight.context(asking)
    chat.counts += [(7, 1)]
    _, turn = tight.run(asking, "go on")
    assert turn["usage"] == {"prompt_tokens": 7, "completion_tokens": 1}
    assert tight.context(asking)["usage"] == turn["usage"]


# Metrics


def figures(api: ToolApi) -> dict[str, float]:
    """The samples of `/metrics` by name and labels, as they stand there."""
    response = api.http.get("/metrics")
    assert response.status_code == 200
    lines = [line for line in response.text.splitlines() if line and not line.startswith("#")]
    samples = (line.rpartition(" ") for line in lines)
    return {name: float(value) for name, _, value in samples}


def calls_total(outcome: str) -> str:
    return f'contextd_tool_calls_total{{outcome="{outcome}"}}'


def test_tool_calls_are_counted(tight: ToolApi, tmp_path: Path) -> None:
    """By how they ended."""
    place, context_id = Place(tmp_path), tight.create()
    before = figures(tight)
    steps = [
        call("echo", text="a"),
        call("echo", text="b"),
        call("refuse", words="no"),
        place.holding(),
    ]
    turn, found = tight.played(context_id, *steps, {"text": "done"})
    assert turn["status"] == "completed"
    statuses = Counter(one["status"] for one in found)
    assert statuses == {"succeeded": 2, "failed": 1, "timed_out": 1}
    after = figures(tight)
    for outcome, times in statuses.items():
        assert after[calls_total(outcome)] - before.get(calls_total(outcome), 0) == times


def test_first_chunks_are_measured(tight: ToolApi) -> None:
    """One a request to the model that answered, in a histogram that adds up."""
    context_id, name = tight.create(), "contextd_first_chunk_seconds"
    before = figures(tight)
    tight.played(context_id, {"delay_ms": 60}, call("echo", text="a"), {"text": "done"})
    after = figures(tight)
    assert after[f"{name}_count"] - before[f"{name}_count"] == 2
    assert after[f"{name}_sum"] - before[f"{name}_sum"] >= 0.06
    buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
    assert buckets == sorted(buckets)
    assert after[f'{name}_bucket{{le="+Inf"}}'] == after[f"{name}_count"]


def test_no_text_in_metrics(tight: ToolApi) -> None:
    """Names of tools and contexts are not labels, as there may be any number of them."""
    context_id = tight.create(tools=[external("ask")])
    tight.asked(context_id, ask())
    tight.cancel(context_id)
    text = tight.http.get("/metrics").text
    assert context_id not in text
    assert '"ask"' not in text
