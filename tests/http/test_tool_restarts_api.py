"""§6 and §8 at the wire: calls, decisions and results over crashes, stops and several processes."""

from pathlib import Path
from typing import Any

from serving import Server
from tooling import ASK, Place, ToolApi, ask, call, guarded, outcomes, start_with_tools, verdict
from wire import problem, script, until

# Crashes and stops


def test_a_crash_while_tools_run(tmp_path: Path, place: Place) -> None:
    """Only what is declared idempotent runs again; the rest ends `outcome_unknown` (§8)."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    other = Place(tmp_path / "other")
    other.folder.mkdir()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    context_id = api.create(tools=["echo", "hold", "hold_again", ASK])
    turn_id, _ = api.waiting(
        context_id, call("echo", text="before"), place.holding("hold"),
        other.holding("hold_again"), ask(), {"text": "done"}, state="executing_tools",
    )  # fmt: skip
    place.began()
    other.began()
    until(lambda: api.call_named(context_id, "echo")["status"] == "succeeded")
    api.answer(context_id, api.call_named(context_id, "ask")["id"], "before the crash")
    server.kill()
    api.close()
    before = len(other.lines())
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        until(lambda: len(other.lines()) > before, "the second run")
        until(lambda: api.call_named(context_id, "hold")["status"] == "failed")
        assert api.context(context_id)["state"] == "executing_tools"
        other.open()
        turn = api.ended(context_id, turn_id)
        assert (turn["status"], turn["attempt"]) == ("completed", 1)
        found = api.calls(context_id)
        assert outcomes(found) == [
            ("echo", "succeeded", None), ("hold", "failed", "outcome_unknown"),
            ("hold_again", "succeeded", None), ("ask", "succeeded", None),
        ]  # fmt: skip
        assert [api.result(context_id, one) for one in found[::2]] == ["before", "released"]
        assert "outcome_unknown" in api.result(context_id, found[1])
        assert found[1]["duration_ms"] is None
        assert place.lines() == ["began"]
        assert other.lines() == ["began", "began", "ended"]
        recovered = [e for e in api.journal(context_id) if e["trigger"] == "recover"]
        assert [(e["from_state"], e["to_state"]) for e in recovered] == [
            ("executing_tools", "executing_tools")
        ]
        api.close()
    finally:
        server.kill()


def test_a_crash_in_a_later_round(tmp_path: Path, place: Place) -> None:
    """The model is asked again for the answer to the results, which costs an attempt; no tool runs."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    context_id = api.create()
    steps = [call("note", path=place.runs), {"text": "half "}, {"delay_ms": 500}, {"text": "more"}]
    turn_id = api.send(context_id, script(*steps))["turn_id"]
    until(lambda: any(m["kind"] == "text" for m in api.context(context_id)["open_messages"]))
    server.kill()
    api.close()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        turn = api.ended(context_id, turn_id)
        assert (turn["status"], turn["attempt"]) == ("completed", 2)
        assert place.lines() == ["ran"]
        contents = [m["content"] for m in api.messages(context_id, include="content")[2:]]
        assert contents == ["noted", "half more"]
        api.close()
    finally:
        server.kill()


def test_a_clean_stop_while_a_tool_runs(tmp_path: Path, place: Place) -> None:
    """The server stops in time although tools hang, also one that refuses to; turns go on later."""

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={"scripted_rate": 0, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    held, blocked, refusing = api.create(), api.create(), api.create()
    other, third = Place(tmp_path / "other"), Place(tmp_path / "third")
    other.folder.mkdir()
    third.folder.mkdir()
    refused, _ = api.waiting(refusing, third.holding("stubborn"), state="executing_tools")
    third.began()
    turn_ids = [
        api.waiting(held, place.holding("hold_again"), state="executing_tools")[0],
        api.waiting(blocked, other.holding("block"), state="executing_tools")[0],
    ]
    place.began()
    other.began()
    assert server.stop() == 0
    api.close()
    server = start_with_tools(make)
    api = ToolApi(server.url)
    try:
        place.began(2)
        place.open()
        assert api.ended(held, turn_ids[0])["status"] == "completed"
        assert api.ended(blocked, turn_ids[1])["status"] == "completed"
        assert outcomes(api.calls(held)) == [("hold_again", "succeeded", None)]
        assert outcomes(api.calls(blocked)) == [("block", "failed", "outcome_unknown")]
        assert api.ended(refusing, refused)["status"] == "completed"
        assert outcomes(api.calls(refusing)) == [("stubborn", "failed", "outcome_unknown")]
        assert other.lines() == ["began"]
        api.close()
    finally:
        server.kill()


def test_decisions_after_a_crash(tmp_path: Path, place: Place) -> None:
    """`awaiting_tool_approval` survives kill -9, and so does what was decided before it."""
    database, settings = tmp_path / "contextd.db", {"scripted_rate": 0}

    def make(**more: Any) -> Server:
        return Server(database, settings={**settings, **more}).start()

    server = start_with_tools(make)
    api = ToolApi(server.url)
    some, none = api.create(), api.create()
    turn_id, (first, second) = api.pending(
        some, guarded(place, "1"), guarded(place, "2"), {"text": "done"}
    )
    denied_turn, (denied,) = api.pending(none, guarded(place, "never"))
    api.decide(some, verdict(first["id"], "approve"))
    before = api.context(some)
    server.kill()
    api.close()
    server = start_with_tools(make)
    try:
        api = ToolApi(server.url)
        after = api.context(some)
        assert {**after, "stream_cursor": ""} == {**before, "stream_cursor": ""}
        assert "recover" not in api.steps(some)
        assert api.decide(some, verdict(first["id"], "approve")) == {
            "state": "awaiting_tool_approval"
        }
        answer = api.post_decisions(some, verdict(first["id"], "deny"))
        problem(answer, 409, "tool_call_decided")
        assert place.lines() == []
        api.decide(some, verdict(second["id"], "approve"))
        api.decide(none, verdict(denied["id"], "deny"))
        assert api.ended(some, turn_id)["status"] == "completed"
        assert api.ended(none, denied_turn)["status"] == "completed"
        assert sorted(place.lines()) == ["1", "2"]
        api.close()
    finally:
        server.kill()


# Other processes


def test_a_cancel_by_another_process(tmp_path: Path, place: Place) -> None:
    """One transaction by whoever got the request; the process that runs the tool finds out (§6)."""
    settings = {"scripted_rate": 0, "poll_s": 0.05, "lease_s": 1}

    def make(**more: Any) -> Server:
        return Server(tmp_path / "contextd.db", settings={**settings, **more}).start()

    first, second = start_with_tools(make), start_with_tools(make)
    one, two = ToolApi(first.url), ToolApi(second.url)
    try:
        context_id = one.create()
        turn_id, _ = one.waiting(context_id, place.holding(), state="executing_tools")
        place.began()
        assert two.cancel(context_id) == {"state": "idle", "cancelled_turn_id": turn_id}
        until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")
        assert two.calls(context_id)[0]["status"] == "cancelled"
        assert one.run(context_id, "on")[1]["status"] == "completed"
        assert one.steps(context_id).count("cancel") == 1
    finally:
        one.close()
        two.close()
        first.kill()
        second.kill()


def test_another_process_decides(tmp_path: Path, place: Place) -> None:
    """Two servers on one database: whoever takes the last decision goes on with the turn."""
    database, settings = tmp_path / "contextd.db", {"scripted_rate": 0, "poll_s": 0.05}

    def make(**more: Any) -> Server:
        return Server(database, settings={**settings, **more}).start()

    first, second = start_with_tools(make), start_with_tools(make)
    one, two = ToolApi(first.url), ToolApi(second.url)
    try:
        context_id = one.create()
        turn_id, (a, b) = one.pending(
            context_id,
            guarded(place, "a"),
            guarded(place, "b"),
            {"text": "on"},
            guarded(place, "c"),
        )
        one.decide(context_id, verdict(a["id"], "approve"))
        two.decide(context_id, verdict(b["id"], "approve"))
        until(lambda: len(two.calls(context_id)) == 3, "the second round")
        two.in_state(context_id, "awaiting_tool_approval")
        first.kill()
        two.decide_all(context_id, "approve")
        assert two.ended(context_id, turn_id)["status"] == "completed"
        assert sorted(place.lines()) == ["a", "b", "c"]
        assert two.steps(context_id).count("execute_tools") == 2
    finally:
        one.close()
        two.close()
        first.kill()
        second.kill()


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
