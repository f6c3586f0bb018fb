"""§6 and §8 at the wire: how long a tool and a turn may work, and how large a result may be."""

from collections.abc import Iterator
from typing import Any

import pytest
from tooling import ASK, Place, ToolApi, ask, call, guarded, serving_tools
from wire import SILENT, ok, until


@pytest.fixture(scope="module")
def hasty(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolApi]:
    """A server with little patience for tools, and small results."""
    settings = {"tool_timeout_s": 0.2, "tool_result_bytes_max": 1000}
    with serving_tools(make_server, tmp_path_factory.mktemp("hasty"), **settings) as client:
        yield client


@pytest.fixture(scope="module")
def brief(make_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolApi]:
    """A server that gives a turn one second of work."""
    folder = tmp_path_factory.mktemp("brief")
    with serving_tools(make_server, folder, turn_timeout_s=1) as client:
        yield client


# A tool


def test_a_giant_result_is_cut(tooled: ToolApi, hasty: ToolApi) -> None:
    """At the limit; the stored chunks are of a size that can be pulled."""
    for client, size, limit in ((tooled, 50_000_000, 256 * 1024), (hasty, 5000, 1000)):
        context_id = client.create()
        turn, (found,) = client.played(context_id, call("giant", size_bytes=size), {"text": "so"})
        assert (turn["status"], found["status"]) == ("completed", "succeeded")
        text = client.result(context_id, found)
        assert text.startswith("xxx")
        assert len(text.encode()) <= limit
        assert set(text[-20:]) != {"x"}, "nothing says that it was cut"


def test_a_tool_that_takes_too_long(hasty: ToolApi, place: Place) -> None:
    """`timed_out`, the model is told, the others' results stay, the tool was stopped."""
    context_id = hasty.create()
    turn, found = hasty.played(
        context_id, place.holding(), call("echo", text="fine"), {"text": "so"}
    )
    assert turn["status"] == "completed"
    assert [one["status"] for one in found] == ["timed_out", "succeeded"]
    assert found[0]["error"]
    assert hasty.result(context_id, found[0])
    assert place.lines() == ["began", "stopped"]


@pytest.mark.parametrize("name", ["block", "stubborn"])
def test_a_tool_that_cannot_be_stopped_is_left_behind(
    hasty: ToolApi, place: Place, name: str
) -> None:
    """`timed_out` all the same; what it answers later is nobody's."""
    context_id = hasty.create()
    turn, (found,) = hasty.played(context_id, place.holding(name), {"text": "so"})
    assert (turn["status"], found["status"]) == ("completed", "timed_out")
    result = hasty.result(context_id, found)
    place.open()
    assert hasty.played(context_id, call("echo", text="x"))[0]["status"] == "completed"
    assert hasty.calls(context_id)[0] == found
    assert hasty.result(context_id, found) == result


# A turn


def test_the_turns_limit_while_a_tool_runs(brief: ToolApi, place: Place) -> None:
    """`fail` from `executing_tools`: the call is cancelled, the tool stopped; a retry goes on."""
    context_id = brief.create()
    turn_id, _ = brief.waiting(
        context_id, call("echo", text="x"), place.holding(), {"text": "done"},
        state="executing_tools",
    )  # fmt: skip
    turn = brief.ended(context_id, turn_id)
    assert (turn["status"], turn["error"]["type"]) == ("failed", "turn_timeout")
    last = brief.journal(context_id)[-1]
    assert (last["trigger"], last["from_state"]) == ("fail", "executing_tools")
    assert [one["status"] for one in brief.calls(context_id)] == ["succeeded", "cancelled"]
    until(lambda: place.lines() == ["began", "stopped"], "the stop of the tool")
    assert brief.replies(context_id, turn_id)
    place.open()
    again = ok(brief.http.post(f"/contexts/{context_id}/retry"), 202)
    assert brief.ended(context_id, again["turn_id"])["status"] == "completed"
    assert place.lines() == ["began", "stopped"]
    assert len(brief.calls(context_id)) == 2
    assert brief.turn(context_id, again["turn_id"])["retry_of"] == turn_id


def test_waiting_for_people_is_no_work(brief: ToolApi, place: Place) -> None:
    """A turn that waited for longer than its limit of work goes on (§6)."""
    context_id = brief.create()
    turn_id, _ = brief.pending(context_id, guarded(place), {"text": "done"})
    _work_to_the_limit(brief)
    brief.decide_all(context_id, "approve")
    turn = brief.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert turn["phases"]["awaiting_tool_approval"] > 1000


def test_waiting_for_external_tools_is_no_work(brief: ToolApi) -> None:
    """Nor does that time count."""
    context_id = brief.create(tools=[ASK])
    turn_id, (found,) = brief.asked(context_id, ask(), {"text": "done"})
    _work_to_the_limit(brief)
    brief.answer(context_id, found["id"])
    turn = brief.ended(context_id, turn_id)
    assert turn["status"] == "completed"
    assert turn["phases"]["awaiting_tool_results"] > 1000


def _work_to_the_limit(brief: ToolApi) -> None:
    """Waits for as long as a turn may work: one that began later has come to its limit."""
    context_id = brief.create()
    _, turn = brief.run(context_id, SILENT)
    assert turn["error"]["type"] == "turn_timeout"
