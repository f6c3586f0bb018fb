"""§8 at the wire: tools that others execute, who post the results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from tooling import (
    ASK,
    Chat,
    Place,
    ToolApi,
    ask,
    at_once,
    call,
    external,
    outcomes,
    serving_tools,
    start_with_tools,
    verdict,
)
from wire import Json, invalid, ok, problem, script, until

PATH = [
    "receive_message", "request_llm", "first_chunk", "end_stream", "execute_tools",
    "await_results", "collect_results", "request_llm", "first_chunk", "end_stream", "finish",
]  # fmt: skip


@pytest.fixture(scope="module")
def api(
    make_server: Any, tmp_path_factory: pytest.TempPathFactory, chat: Chat
) -> Iterator[ToolApi]:
    """A server with tools and little time for a turn's work."""
    settings = {"openai_base_url": chat.url, "openai_api_key": "none", "model": "fake"}
    folder = tmp_path_factory.mktemp("workspace")
    with serving_tools(make_server, folder, turn_timeout_s=4, **settings) as client:
        yield client


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create(tools=[ASK, "hold", "echo", "guarded"])


# A result


def test_a_result_is_posted(api: ToolApi, context_id: str) -> None:
    """Through `awaiting_tool_results`, and on with what was posted."""
    turn_id, (found,) = api.asked(context_id, ask("why"), {"text": "thanks"})
    assert found["name"] == "ask"
    assert found["arguments"] == {"question": "why"}
    assert found["requires_approval"] is False
    assert found["result_message_id"] is None
    assert found["status"] in ("approved", "running")
    assert api.context(context_id)["pending_tool_calls"] == []
    assert api.answer(context_id, found["id"], "because") == {"state": "processing_tool_results"}
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert api.steps(context_id) == PATH
    assert "awaiting_tool_results" in turn["phases"]
    (found,) = api.calls(context_id)
    assert outcomes([found]) == [("ask", "succeeded", None)]
    assert api.result(context_id, found) == "because"
    message = api.message(context_id, found["result_message_id"])
    assert (message["role"], message["kind"], message["status"]) == (
        "tool", "tool_result", "completed",
    )  # fmt: skip
    assert message["metadata"]["tool_call_id"] == found["id"]


def test_an_error_is_posted(api: ToolApi, context_id: str) -> None:
    """`is_error`: the call failed, the turn goes on, the model reads the words."""
    turn_id, (found,) = api.asked(context_id, ask())
    api.answer(context_id, found["id"], "nobody is home", is_error=True)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    (found,) = api.calls(context_id)
    assert found["status"] == "failed"
    assert found["error"]
    assert api.result(context_id, found) == "nobody is home"


@pytest.mark.parametrize("content", ["", " ", "é" * 70_000, "x" * 200_000, "a\nb\u2028🙂"])
def test_whatever_the_result_says(api: ToolApi, context_id: str, content: str) -> None:
    """Empty, long or odd: it is stored as it came."""
    turn_id, (found,) = api.asked(context_id, ask())
    api.answer(context_id, found["id"], content)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.result(context_id, api.calls(context_id)[0]) == content


def test_results_come_in_any_order(api: ToolApi, context_id: str) -> None:
    """The turn goes on with the last; each result belongs to its call."""
    turn_id, found = api.asked(context_id, *(ask(str(n)) for n in range(4)), {"text": "all"})
    for one in (found[2], found[0], found[3]):
        answer = api.answer(context_id, one["id"], one["arguments"]["question"])
        assert answer == {"state": "awaiting_tool_results"}
    assert api.answer(context_id, found[1]["id"], "1") == {"state": "processing_tool_results"}
    api.ended(context_id, turn_id)
    assert [api.result(context_id, one) for one in api.calls(context_id)] == ["0", "1", "2", "3"]
    assert api.steps(context_id).count("collect_results") == 1


def test_a_result_while_others_still_run(api: ToolApi, context_id: str, place: Place) -> None:
    """Taken in `executing_tools`; with all of them there nobody is waited for."""
    turn_id, found = api.waiting(
        context_id, place.holding(), ask("1"), ask("2"), state="executing_tools"
    )
    place.began()
    assert api.answer(context_id, found[1]["id"]) == {"state": "executing_tools"}
    assert api.answer(context_id, found[2]["id"]) == {"state": "executing_tools"}
    place.open()
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert "await_results" not in api.steps(context_id)
    assert [one["status"] for one in api.calls(context_id)] == ["succeeded"] * 3


def test_only_external_calls_left(api: ToolApi, context_id: str, place: Place) -> None:
    """`await_results` when the server's own have ended, and not before."""
    turn_id, found = api.waiting(context_id, place.holding(), ask(), state="executing_tools")
    place.began()
    assert api.context(context_id)["state"] == "executing_tools"
    place.open()
    api.in_state(context_id, "awaiting_tool_results")
    assert api.call_named(context_id, "hold")["status"] == "succeeded"
    api.answer(context_id, found[1]["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_several_rounds_of_external_calls(api: ToolApi, context_id: str) -> None:
    turn_id, (first,) = api.asked(context_id, ask("1"), {"text": "mid"}, ask("2"), {"text": "end"})
    api.answer(context_id, first["id"], "one")
    until(lambda: len(api.calls(context_id)) == 2)
    api.in_state(context_id, "awaiting_tool_results")
    assert api.post_result(context_id, first["id"], content="one").status_code == 202
    assert api.context(context_id)["state"] == "awaiting_tool_results"
    api.answer(context_id, api.calls(context_id)[1]["id"], "two")
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert api.steps(context_id).count("await_results") == 2


def test_the_model_sees_the_results(api: ToolApi, chat: Chat) -> None:
    """Each at its call, in the calls' order and not in that of the posts."""
    chat.replies = [[("ask", '{"question":"1"}'), ("ask", '{"question":"2"}')], "done"]
    context_id = api.create(provider="openai", tools=[ASK])
    turn_id = api.send(context_id, "go")["turn_id"]
    api.in_state(context_id, "awaiting_tool_results")
    first, second = api.calls(context_id)
    api.answer(context_id, second["id"], "two")
    api.answer(context_id, first["id"], "one")
    api.ended(context_id, turn_id)
    told = chat.requests[-1]["messages"]
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool"]
    assert [message["content"] for message in told[2:]] == ["one", "two"]


# Approval and mode


def test_an_external_tool_that_needs_approval(api: ToolApi) -> None:
    """It waits for a person, then for its result; a denial needs no result."""
    context_id = api.create(tools=[external("ask", requires_approval=True)])
    turn_id, (found,) = api.pending(context_id, ask("old"), {"text": "done"})
    assert found["requires_approval"] is True
    early = api.post_result(context_id, found["id"], content="early")
    assert problem(early, 409, "illegal_transition")["state"] == "awaiting_tool_approval"
    api.decide_all(context_id, "approve", arguments={"question": "new"})
    api.in_state(context_id, "awaiting_tool_results")
    (found,) = api.calls(context_id)
    assert found["arguments"] == {"question": "new"}
    api.answer(context_id, found["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"
    turn_id, _ = api.pending(context_id, ask())
    assert api.decide_all(context_id, "deny") == {"state": "processing_tool_results"}
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_no_result_until_all_is_decided(api: ToolApi, context_id: str, place: Place) -> None:
    """Nothing of a request runs until all its calls are decided: a result then is too early (§8)."""
    _, (asked, _) = api.pending(context_id, ask(), call("guarded", path=place.runs))
    try:
        early = api.post_result(context_id, asked["id"], content="early")
        assert problem(early, 409, "illegal_transition")["state"] == "awaiting_tool_approval"
        assert api.call_named(context_id, "ask")["result_message_id"] is None
    finally:
        api.cancel(context_id)


def test_plan_blocks_external_tools_that_change_things(api: ToolApi) -> None:
    """But for those that say they are read-only."""
    tools = [external("look", read_only=True), external("act")]
    context_id = api.create(mode="plan", tools=tools)
    turn_id, found = api.asked(context_id, ask(name="look"), ask(name="act"))
    assert [one["error"] for one in found] == [None, "plan_mode"]
    api.answer(context_id, found[0]["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"


def test_plan_is_enforced_when_an_external_tool_would_run(api: ToolApi) -> None:
    """A switch to `plan` before the approval: nobody is asked to execute it (§8)."""
    context_id = api.create(tools=[external("ask", requires_approval=True)])
    turn_id, _ = api.pending(context_id, ask(), {"text": "so"})
    ok(api.http.patch(f"/contexts/{context_id}", json={"mode": "plan"}))
    api.decide_all(context_id, "approve")
    try:
        state = api.in_state(context_id, "idle", "awaiting_tool_results")["state"]
        assert outcomes(api.calls(context_id)) == [("ask", "failed", "plan_mode")]
        assert state == "idle"
        assert api.turn(context_id, turn_id)["status"] == "completed"
    finally:
        api.cancel(context_id)


def test_invalid_arguments_reach_nobody(api: ToolApi, context_id: str) -> None:
    """Checked against the declared schema before anything runs."""
    turn, found = api.played(
        context_id, call("ask"), call("ask", question=1), call("ask", question="x", more=1)
    )
    assert turn["status"] == "completed"
    assert outcomes(found) == [("ask", "failed", "invalid_arguments")] * 3
    assert "await_results" not in api.steps(context_id)


def test_a_declared_tool_goes_before_the_servers(api: ToolApi) -> None:
    """Of the same name: what the context says counts."""
    context_id = api.create(tools=[external("echo")])
    turn_id, (found,) = api.asked(context_id, ask(name="echo"))
    api.answer(context_id, found["id"], "mine")
    api.ended(context_id, turn_id)
    assert api.result(context_id, api.calls(context_id)[0]) == "mine"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"external": False}, "tools[0].external"),
        ({"name": ""}, "tools[0].name"),
        ({"name": "a b"}, "tools[0].name"),
        ({"description": 1}, "tools[0].description"),
        ({"parameters": "x"}, "tools[0].parameters"),
        ({"requires_approval": "yes"}, "tools[0].requires_approval"),
        ({"idempotent": True}, "tools[0].idempotent"),
    ],
)
def test_a_bad_declaration_is_400(api: ToolApi, more: Json, field: str) -> None:
    invalid(api.http.post("/contexts", json={"tools": [{**ASK, **more}]}), field)


# Repeats and refusals


def test_the_same_result_again_is_harmless(api: ToolApi, context_id: str) -> None:
    """At once, and after the turn; another one is refused and changes nothing."""
    turn_id, (first, second) = api.asked(context_id, ask("1"), ask("2"), {"text": "x"})
    api.answer(context_id, first["id"], "one")
    before = api.context(context_id)
    assert api.answer(context_id, first["id"], "one") == {"state": "awaiting_tool_results"}
    for body in ({"content": "two"}, {"content": "one", "is_error": True}):
        answer = api.post_result(context_id, first["id"], **body)
        assert problem(answer, 409, "tool_call_decided")["tool_call_id"] == first["id"]
    assert api.context(context_id) == before
    api.answer(context_id, second["id"], "two")
    api.ended(context_id, turn_id)
    settled = api.context(context_id)
    assert api.answer(context_id, second["id"], "two") == {"state": "idle"}
    problem(api.post_result(context_id, second["id"], content="x"), 409, "tool_call_decided")
    assert api.context(context_id) == settled


def test_unknown_calls_are_404(api: ToolApi, context_id: str) -> None:
    """Also another context's, and with an id that is none."""
    other = api.create(tools=[ASK])
    _, (elsewhere,) = api.asked(other, ask())
    for id_ in ("nothing", elsewhere["id"], "x" * 65):
        answer = api.post_result(context_id, id_, content="x")
        assert problem(answer, 404, "tool_call_not_found")["tool_call_id"] == id_
    missing = api.post_result("nothing", elsewhere["id"], content="x")
    assert problem(missing, 404, "context_not_found")["context_id"] == "nothing"
    api.cancel(other)


def test_bad_results_are_400(api: ToolApi, context_id: str) -> None:
    """Each named; nothing changed."""
    _, (found,) = api.asked(context_id, ask())
    before = api.context(context_id)
    for body, field in (
        ({}, "content"), ({"content": 1}, "content"), ({"content": None}, "content"),
        ({"content": "a\x00b"}, "content"), ({"content": "x", "is_error": "no"}, "is_error"),
        ({"content": "x", "more": 1}, "more"),
    ):  # fmt: skip
        invalid(api.post_result(context_id, found["id"], **body), field)
    path = f"/contexts/{context_id}/tool-calls/{found['id']}/result"
    typed = api.http.post(path, content="x", headers={"content-type": "text/plain"})
    problem(typed, 415, "unsupported_media_type")
    large = api.post_result(context_id, found["id"], content="x" * (10 * 1024 * 1024))
    assert problem(large, 413, "payload_too_large")["limit_bytes"] == 10 * 1024 * 1024
    assert api.context(context_id) == before
    api.cancel(context_id)


def test_the_servers_own_calls_take_no_result(api: ToolApi, context_id: str, place: Place) -> None:
    """Running, pending or done: 409."""
    turn_id, (found,) = api.waiting(context_id, place.holding(), state="executing_tools")
    place.began()
    answer = api.post_result(context_id, found["id"], content="mine")
    assert problem(answer, 409, "illegal_transition")["state"] == "executing_tools"
    place.open()
    api.ended(context_id, turn_id)
    assert api.post_result(context_id, found["id"], content="mine").status_code == 409
    assert api.result(context_id, api.calls(context_id)[0]) == "released"
    _, (found,) = api.pending(context_id, call("guarded", path=place.runs))
    assert api.post_result(context_id, found["id"], content="mine").status_code == 409
    api.cancel(context_id)


def test_a_decision_about_a_call_that_waits_for_nobody(api: ToolApi, context_id: str) -> None:
    """It was never pending: approving or denying it is 409."""
    _, (found,) = api.asked(context_id, ask())
    for decision in ("deny", "approve"):
        answer = api.post_decisions(context_id, verdict(found["id"], decision))
        assert problem(answer, 409, "tool_call_decided")["tool_call_id"] == found["id"]
    assert api.context(context_id)["state"] == "awaiting_tool_results"
    api.cancel(context_id)


# While it waits


def test_a_result_after_a_cancel(api: ToolApi, context_id: str) -> None:
    """The calls are cancelled, what was posted stays; a late result is refused."""
    turn_id, (first, second) = api.asked(context_id, {"text": "hm "}, ask("1"), ask("2"))
    api.answer(context_id, first["id"], "one")
    assert api.cancel(context_id) == {"state": "idle", "cancelled_turn_id": turn_id}
    assert [one["status"] for one in api.calls(context_id)] == ["succeeded", "cancelled"]
    settled = api.context(context_id)
    late = api.post_result(context_id, second["id"], content="two")
    assert problem(late, 409, "tool_call_decided")["tool_call_id"] == second["id"]
    assert api.context(context_id) == settled
    assert api.result(context_id, api.calls(context_id)[0]) == "one"
    assert api.run(context_id, "on")[1]["status"] == "completed"


def test_the_history_after_a_cancel_is_well_formed(api: ToolApi, chat: Chat) -> None:
    """Every call has a result for the model, also one that was cancelled (§8)."""
    chat.replies = [[("ask", '{"question":"1"}'), ("ask", '{"question":"2"}')], "next"]
    context_id = api.create(provider="openai", tools=[ASK])
    api.send(context_id, "go")
    api.in_state(context_id, "awaiting_tool_results")
    first, _ = api.calls(context_id)
    api.answer(context_id, first["id"], "one")
    api.cancel(context_id)
    assert api.run(context_id, "on")[1]["status"] == "completed"
    told = chat.requests[-1]["messages"]
    assert [m["role"] for m in told] == ["user", "assistant", "tool", "tool", "user"]
    asked = [one["id"] for one in told[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in told[2:4]] == asked
    assert told[2]["content"] == "one"
    assert told[3]["content"]


def test_waiting_for_external_tools_is_no_work(api: ToolApi, context_id: str) -> None:
    """A turn that waited for longer than its limit of work goes on (§6)."""
    turn_id, (found,) = api.asked(context_id, ask(), {"text": "done"})
    api.ended(other := api.create(), api.send(other, script({"delay_ms": 60_000}))["turn_id"])
    api.answer(context_id, found["id"])
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert turn["phases"]["awaiting_tool_results"] > 4000


def test_queue_interrupt_and_delete(api: ToolApi) -> None:
    """As for any turn: behind it is queued, instead of it interrupts, and all can go."""
    context_id = api.create(tools=[ASK])
    turn_id, (found,) = api.asked(context_id, ask())
    queued = api.send(context_id, "one")
    assert queued["queued"] is True
    answer = api.send(context_id, "now", on_busy="interrupt")
    assert api.ended(context_id, answer["turn_id"])["status"] == "completed"
    assert api.ended(context_id, queued["turn_id"])["status"] == "completed"
    assert api.turn(context_id, turn_id)["status"] == "cancelled"
    problem(api.post_result(context_id, found["id"], content="x"), 409, "tool_call_decided")
    _, (found,) = api.asked(context_id, ask())
    assert api.http.delete(f"/contexts/{context_id}").status_code == 204
    gone = api.post_result(context_id, found["id"], content="x")
    problem(gone, 404, "context_not_found")


def test_a_declaration_that_went_while_its_call_waited(api: ToolApi, context_id: str) -> None:
    """The result is taken all the same: it was asked for."""
    turn_id, (found,) = api.asked(context_id, ask(), {"text": "done"})
    ok(api.http.patch(f"/contexts/{context_id}", json={"tools": []}))
    api.answer(context_id, found["id"])
    assert api.ended(context_id, turn_id)["status"] == "completed"


# Races, restarts, other processes


def test_results_at_once(api: ToolApi, context_id: str) -> None:
    """Each posted twice, all in parallel: every call has one result, the turn goes on once."""
    turn_id, found = api.asked(context_id, *(ask(str(n)) for n in range(8)), {"text": "all"})
    answers = at_once(
        *(
            lambda i=one["id"]: api.post_result(context_id, i, content=f"for {i}")
            for one in [*found, *found]
        )
    )
    assert {answer.status_code for answer in answers} == {202}
    turn = api.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert len(turn["message_ids"]) == 1 + 8 + 8 + 1
    found = api.calls(context_id)
    assert [api.result(context_id, one) for one in found] == [f"for {o['id']}" for o in found]
    assert api.steps(context_id).count("collect_results") == 1


def test_rival_results(api: ToolApi, context_id: str) -> None:
    """Of different ones exactly one is taken."""
    turn_id, (found,) = api.asked(context_id, ask())
    answers = at_once(
        *(
            lambda n=n: api.post_result(
                context_id, found["id"], content=str(n), is_error=n % 2 == 0
            )
            for n in range(6)
        )
    )
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [202] + [409] * 5
    api.ended(context_id, turn_id)
    (found,) = api.calls(context_id)
    winner = codes.index(202)
    assert api.result(context_id, found) == str(winner)
    assert found["status"] == ("failed" if winner % 2 == 0 else "succeeded")


def test_a_result_and_a_cancel_at_once(api: ToolApi) -> None:
    """Either the result was first, or it is refused; the turn has one end."""
    for _ in range(10):
        context_id = api.create(tools=[ASK])
        turn_id, (found,) = api.asked(context_id, ask(), {"delay_ms": 600_000})
        posted, cancelled = at_once(
            lambda c=context_id, i=found["id"]: api.post_result(c, i, content="x"),
            lambda c=context_id: api.http.post(f"/contexts/{c}/cancel"),
        )
        assert cancelled.json() == {"state": "idle", "cancelled_turn_id": turn_id}
        assert api.turn(context_id, turn_id)["status"] == "cancelled"
        status = api.calls(context_id)[0]["status"]
        assert (posted.status_code, status) in [(202, "succeeded"), (409, "cancelled")]
        assert api.steps(context_id).count("cancel") == 1


def test_results_after_a_crash_and_by_another_process(tmp_path: Path) -> None:
    """`awaiting_tool_results` survives kill -9; a second server on the database takes results."""
    settings = {"scripted_rate": 0, "poll_s": 0.05}

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={**settings, **more}).start()

    first = start_with_tools(make)
    one = ToolApi(first.url)
    context_id = one.create(tools=[ASK])
    turn_id, (a, b) = one.asked(context_id, ask("a"), ask("b"), {"text": "mid"}, ask("c"))
    one.answer(context_id, a["id"], "a")
    first.kill()
    one.close()
    first, second = start_with_tools(make), start_with_tools(make)
    one, two = ToolApi(first.url), ToolApi(second.url)
    try:
        assert one.context(context_id)["state"] == "awaiting_tool_results"
        assert "recover" not in one.steps(context_id)
        two.answer(context_id, b["id"], "b")
        until(lambda: len(one.calls(context_id)) == 3, "the second round")
        one.in_state(context_id, "awaiting_tool_results")
        second.kill()
        one.answer(context_id, one.calls(context_id)[2]["id"], "c")
        assert one.ended(context_id, turn_id)["status"] == "completed"
        found = one.calls(context_id)
        assert [one.result(context_id, each) for each in found] == ["a", "b", "c"]
    finally:
        one.close()
        two.close()
        first.kill()
        second.kill()


def test_the_model_sees_what_it_has_to_answer(make_server: Any, tmp_path: Path, chat: Chat) -> None:
    """A result beyond the limit of the history: the newest is sent all the same, with its call (§6)."""
    settings = {
        "openai_base_url": chat.url, "openai_api_key": "none", "model": "fake",
        "history_bytes_max": 2000,
    }  # fmt: skip
    with serving_tools(make_server, tmp_path, **settings) as api:
        chat.replies = [[("ask", '{"question":"1"}')], "done"]
        context_id = api.create(provider="openai", tools=[ASK])
        turn_id = api.send(context_id, "the question")["turn_id"]
        api.in_state(context_id, "awaiting_tool_results")
        api.answer(context_id, api.calls(context_id)[0]["id"], "long " * 1000)
        assert api.ended(context_id, turn_id)["status"] == "completed"
    roles = [message["role"] for message in chat.requests[-1]["messages"]]
    assert roles[-2:] == ["assistant", "tool"]
