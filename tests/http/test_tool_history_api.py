"""§8 at the wire: what a model is offered, and what it is shown of calls and their results."""

import json
from pathlib import Path
from typing import Any

import pytest
from tooling import ASK, Chat, Place, ToolApi, external, serving_tools
from wire import ok


@pytest.fixture(scope="module")
def api(tooled: ToolApi) -> ToolApi:
    """The server with tools."""
    return tooled


# Offers


def test_plan_offers_read_only_tools_only(api: ToolApi, chat: Chat) -> None:
    """What a request offers follows the mode and the tools as they are at that request."""
    tools = ["echo", "note", external("look", read_only=True), external("act")]
    context_id = api.create(provider="openai", mode="plan", tools=tools)
    offered = []
    for patch in ({}, {"mode": "act"}, {"tools": ["note"]}, {"tools": []}):
        ok(api.http.patch(f"/contexts/{context_id}", json=patch))
        chat.replies = ["fine"]
        api.run(context_id, "go")
        offers = chat.requests[-1].get("tools") or []
        offered.append([offer["function"]["name"] for offer in offers])
    assert offered == [["echo", "look"], ["echo", "note", "look", "act"], ["note"], []]


def test_an_offer_has_the_tools_schema(api: ToolApi, chat: Chat) -> None:
    """Name, description, and parameters as JSON Schema."""
    context_id = api.create(provider="openai", tools=["echo", external("ask")])
    chat.replies = ["fine"]
    api.run(context_id, "go")
    echo, asking = [offer["function"] for offer in chat.requests[-1]["tools"]]
    assert echo["description"] == "Gives the text back."
    assert echo["parameters"]["required"] == ["text"]
    assert asking["parameters"] == external("ask")["parameters"]


# Calls and results


def test_the_model_sees_calls_and_results(api: ToolApi, chat: Chat) -> None:
    """One message of the assistant with all its calls, then a result for each."""
    chat.replies = [
        [("echo", '{"text":"1"}'), ("nope", "{}"), ("echo", '{"text":"2"}')],
        [("echo", '{"text":"3"}')],
        "done",
        "next",
    ]
    context_id = api.create(provider="openai")
    api.run(context_id, "go")
    told = chat.requests[-1]["messages"]
    roles = [message["role"] for message in told]
    assert roles == ["user", "assistant", "tool", "tool", "tool", "assistant", "tool"]
    asked = [one["id"] for one in told[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in told[2:5]] == asked
    assert len(set(asked)) == 3
    assert [told[2]["content"], told[4]["content"], told[6]["content"]] == ["1", "2", "3"]
    assert "nope" in told[3]["content"]
    api.run(context_id, "again")
    told = chat.requests[-1]["messages"]
    assert [message["role"] for message in told] == [*roles, "assistant", "user"]


def test_a_message_stored_meanwhile_does_not_part_call_and_result(
    api: ToolApi, chat: Chat, place: Place
) -> None:
    """`respond: false` works in every state (§3.1); the history stays well-formed (§8)."""
    arguments = place.holding()["tool_call"]["arguments"]
    chat.replies = [[("hold", json.dumps(arguments))], "done"]
    context_id = api.create(provider="openai")
    turn_id = api.send(context_id, "go")["turn_id"]
    place.began()
    api.send(context_id, "by the way", respond=False)
    place.open()
    assert api.ended(context_id, turn_id)["status"] == "completed"
    told = [(message["role"], message["content"]) for message in chat.requests[-1]["messages"]]
    asked = [role for role, _ in told].index("assistant")
    assert told[asked + 1] == ("tool", "released")
    assert ("user", "by the way") in told


def test_approve_with_other_arguments(
    api: ToolApi, chat: Chat, context_id: str, place: Place
) -> None:
    """They replace the model's: for the tool, for the list of calls, and in what the model sees."""
    arguments = {"path": place.runs, "line": "the model's"}
    chat.replies = [[("guarded", json.dumps(arguments))], "done"]
    context_id = api.create(provider="openai")
    turn_id = api.send(context_id, "go")["turn_id"]
    api.in_state(context_id, "awaiting_tool_approval")
    edited = {"path": place.runs, "line": "mine"}
    api.decide_all(context_id, "approve", arguments=edited)
    assert api.ended(context_id, turn_id)["status"] == "completed"
    assert place.lines() == ["mine"]
    (found,) = api.calls(context_id)
    assert found["arguments"] == edited
    assert json.loads(api.text(context_id, found["message_id"])) == arguments
    asked = chat.requests[-1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(asked) == edited


# Results of external tools


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


def test_the_model_sees_what_it_has_to_answer(make_server: Any, tmp_path: Path, chat: Chat) -> None:
    """A result beyond the limit of the history: the newest is sent all the same, with its call (§6)."""
    with serving_tools(make_server, tmp_path, history_bytes_max=2000, **chat.settings) as api:
        chat.replies = [[("ask", '{"question":"1"}')], "done"]
        context_id = api.create(provider="openai", tools=[ASK])
        turn_id = api.send(context_id, "the question")["turn_id"]
        api.in_state(context_id, "awaiting_tool_results")
        api.answer(context_id, api.calls(context_id)[0]["id"], "long " * 1000)
        assert api.ended(context_id, turn_id)["status"] == "completed"
    roles = [message["role"] for message in chat.requests[-1]["messages"]]
    assert roles[-2:] == ["assistant", "tool"]
