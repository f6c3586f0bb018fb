"""§8 at the wire: results that are refused, come late, twice or at the same time."""

import pytest
from tooling import ASK, Place, ToolApi, ask, at_once, call, verdict
from wire import invalid, ok, problem


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


@pytest.fixture
def context_id(api: ToolApi) -> str:
    return api.create(tools=[ASK, "hold", "echo", "guarded"])


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


# Races


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
