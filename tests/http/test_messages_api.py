"""§3.1 and §3.2 at the wire: forks and lists."""

import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from bodies import MESSAGE_FIELDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import (
    ENDLESS,
    Api,
    Json,
    invalid,
    ok,
    problem,
    script,
    until,
)


def ids(items: list[Json]) -> list[str]:
    return [item["id"] for item in items]


# Forks


def test_a_send_from_an_earlier_message_makes_a_branch(api: Api, context_id: str) -> None:
    """It becomes active, shares what stands above, and the old branch is as it was."""
    api.run(context_id, "one")
    api.run(context_id, "two")
    old = api.messages(context_id)
    answer, turn = api.run(context_id, "instead", parent_id=old[1]["id"])
    context = api.context(context_id)
    assert context["active_branch"] != "main"
    assert turn["branch"] == context["active_branch"]
    new = api.messages(context_id)
    assert ids(new)[:2] == ids(old)[:2]
    assert new[2]["id"] == answer["message_id"]
    assert new[2]["parent_id"] == old[1]["id"]
    assert len(new) == 4
    assert api.messages(context_id, branch="main") == old
    assert api.messages(context_id, branch=context["active_branch"]) == new
    assert api.text(context_id, new[3]["id"]) == "You said: instead"
    switched = ok(api.http.patch(f"/contexts/{context_id}", json={"active_branch": "main"}))
    assert switched["active_branch"] == "main"
    assert api.messages(context_id) == old
    api.run(context_id, "three", branch=context["active_branch"])
    assert api.messages(context_id) == old
    assert len(api.messages(context_id, branch=context["active_branch"])) == 6


def test_a_repeated_fork_makes_no_second_branch(api: Api, context_id: str) -> None:
    """A repeat starts nothing, so it branches nothing."""
    first, _ = api.run(context_id, "one")
    api.run(context_id, "fork", parent_id=first["message_id"], message_id="f")
    before = api.context(context_id)
    api.send(context_id, "fork", parent_id=first["message_id"], message_id="f")
    assert api.context(context_id) == before


def test_a_fork_of_a_fork_of_the_first_message(api: Api, context_id: str) -> None:
    """Branches nest: each list is its own line through the tree, by parent_id."""
    root, _ = api.run(context_id, "root")
    lines = {}
    parent = root["message_id"]
    for n in range(4):
        answer, _ = api.run(context_id, f"fork {n}", parent_id=parent)
        lines[api.context(context_id)["active_branch"]] = answer["message_id"]
        parent = api.messages(context_id)[-1]["id"]
    assert len(lines) == 4
    for branch, message_id in lines.items():
        listed = api.messages(context_id, branch=branch, limit=1)
        for before, after in pairwise(listed):
            assert after["parent_id"] == before["id"]
        assert message_id in ids(listed)
        assert listed[0]["id"] == root["message_id"]


def test_unknown_places_are_404(api: Api, context_id: str) -> None:
    """branch_not_found and message_not_found with what was asked for; nothing is stored."""
    refusal = problem(api.post_message(context_id, "x", branch="no"), 404, "branch_not_found")
    assert refusal["branch"] == "no"
    refusal = problem(api.post_message(context_id, "x", parent_id="no"), 404, "message_not_found")
    assert refusal["message_id"] == "no"
    response = api.http.get(f"/contexts/{context_id}/messages/no")
    assert problem(response, 404, "message_not_found")["message_id"] == "no"
    response = api.http.get(f"/contexts/{context_id}/messages?branch=no")
    assert problem(response, 404, "branch_not_found")["branch"] == "no"
    other = api.create()
    elsewhere = api.send(other, "x", respond=False)["message_id"]
    refused = api.post_message(context_id, "x", parent_id=elsewhere)
    problem(refused, 404, "message_not_found")
    problem(api.http.get(f"/contexts/{context_id}/messages/{elsewhere}"), 404, "message_not_found")
    assert api.context(context_id)["message_count"] == 0


# Lists


def test_a_list_is_in_conversation_order_and_of_one_snapshot(api: Api, context_id: str) -> None:
    """items, next_cursor, revision and stream_cursor, the last two as the Context has them."""
    for n in range(3):
        api.run(context_id, f"message {n}")
    page = api.page(context_id)
    assert set(page) == {"items", "next_cursor", "revision", "stream_cursor"}
    context = api.context(context_id)
    assert page["next_cursor"] is None
    assert page["revision"] == context["revision"]
    assert page["stream_cursor"] == context["stream_cursor"]
    assert [set(item) for item in page["items"]] == [MESSAGE_FIELDS] * 6
    assert [item["role"] for item in page["items"]] == ["user", "assistant"] * 3
    assert page["items"] == [api.message(context_id, id_) for id_ in ids(page["items"])]
    for limit in (1, 2, 5, 6, 7):
        assert api.messages(context_id, limit=limit) == page["items"]


def test_content_can_be_included(api: Api, context_id: str) -> None:
    """content and content_sequence beside each item: exactly chunks 1 to content_sequence."""
    api.run(context_id, "Grüße dich")
    page = api.page(context_id, include="content")
    for item in page["items"]:
        assert set(item) == MESSAGE_FIELDS | {"content", "content_sequence"}
        assert item["content"] == api.text(context_id, item["id"])
        assert item["content_sequence"] == item["final_sequence"]


def test_included_content_of_an_open_message_is_whole_chunks(api: Api, context_id: str) -> None:
    """What is there is there exactly, and pulling goes on from content_sequence."""
    api.send(context_id, script({"chunks": ["a", "bc", "def"]}, {"delay_ms": 600_000}))
    until(lambda: api.opened(context_id)["current_sequence"] == 3)
    item = api.page(context_id, include="content")["items"][-1]
    assert (item["content"], item["content_sequence"]) == ("abcdef", 3)
    assert item["status"] == "streaming"
    api.cancel(context_id)


def test_included_content_is_bounded_a_page(tight: Api) -> None:
    """At most the limit of a pull a page; the rest is pulled, from where the content ends."""
    context_id = tight.create()
    for n in range(4):
        tight.run(context_id, script({"repeat": 9, "text": f"{n}ä-------"}))
    page = tight.page(context_id, include="content")
    assert sum(len(item["content"].encode()) for item in page["items"]) <= 100
    assert any(item["content_sequence"] < item["current_sequence"] for item in page["items"])
    for item in page["items"]:
        texts = tight.texts(context_id, item["id"])
        held = item["content_sequence"]
        assert item["content"] == "".join(texts[:held])
        rest = tight.pull(context_id, item["id"], from_sequence=held)
        assert "".join(texts[held:]).startswith(rest["content"])


def test_since_revision_gives_what_changed_on_all_branches(api: Api, context_id: str) -> None:
    """Only what changed after it, so a client that holds a revision reads little."""
    api.run(context_id, "one")
    held = api.page(context_id)
    assert api.messages(context_id, since_revision=held["revision"]) == []
    api.run(context_id, "fork", parent_id=held["items"][0]["id"])
    ok(api.http.patch(f"/contexts/{context_id}", json={"active_branch": "main"}))
    api.run(context_id, "two")
    changed = api.messages(context_id, since_revision=held["revision"])
    texts = {api.text(context_id, item["id"]) for item in changed}
    assert texts == {"fork", "You said: fork", "two", "You said: two"}
    assert len(changed) == 4
    for limit in (1, 3, 4):
        paged = api.messages(context_id, since_revision=held["revision"], limit=limit)
        assert sorted(ids(paged)) == sorted(ids(changed))
    everything = api.messages(context_id, since_revision=0)
    assert len(everything) == 6
    with_content = api.messages(context_id, since_revision=0, include="content")
    assert {item["content"] for item in with_content} == texts | {"one", "You said: one"}


def test_since_revision_sees_a_message_close(api: Api, context_id: str) -> None:
    """A message that was open at the revision held is listed again when it is closed."""
    api.send(context_id, ENDLESS)
    message_id = api.opened(context_id)["message_id"]
    held = api.page(context_id)
    assert held["items"][-1]["status"] == "streaming"
    api.cancel(context_id)
    changed = api.messages(context_id, since_revision=held["revision"])
    assert [(item["id"], item["status"]) for item in changed] == [(message_id, "cancelled")]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=1.0", "limit"),
        ("cursor=garbage", "cursor"),
        ("cursor=%00", "cursor"),
        ("include=everything", "include"),
        ("include=", "include"),
        ("since_revision=-1", "since_revision"),
        ("since_revision=1.5", "since_revision"),
        ("since_revision=x", "since_revision"),
        ("since_revision=99999999999999999999", "since_revision"),
        ("colour=red", "colour"),
        ("content=1", "content"),
    ],
)
def test_a_wrong_parameter_of_a_message_list_is_named(
    api: Api, context_id: str, query: str, field: str
) -> None:
    """400 with the parameter's name."""
    invalid(api.http.get(f"/contexts/{context_id}/messages?{query}"), field)


def test_every_unknown_parameter_is_named(api: Api, context_id: str) -> None:
    """All of them, and on routes that have no parameters too."""
    body = invalid(api.http.get(f"/contexts/{context_id}/messages?a=1&b=2"), "a")
    assert {error["field"] for error in body["errors"]} == {"a", "b"}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_text_is_kept_and_answered_exactly(api: Api, text: str) -> None:
    """What was sent is what is pulled, and the scripted answer joins to `You said: <text>`."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    context_id = api.create()
    respond = not (isinstance(document, dict) and "script" in document)
    answer = api.send(context_id, text, respond=respond)
    assert api.text(context_id, answer["message_id"]) == text
    if respond:
        api.ended(context_id, answer["turn_id"])
        (reply,) = api.replies(context_id, answer["turn_id"])
        assert api.text(context_id, reply["id"]) == f"You said: {text}"


def test_the_server_refuses_what_it_does_not_know_everywhere(api: Api, context_id: str) -> None:
    """No route ignores a query parameter: each names it (§1)."""
    answer = api.send(context_id, "x", respond=False)
    message = f"/contexts/{context_id}/messages/{answer['message_id']}"
    turn = api.run(context_id, "y")[0]["turn_id"]
    routes = [
        ("GET", "/contexts"),
        ("POST", "/contexts"),
        ("GET", f"/contexts/{context_id}"),
        ("PATCH", f"/contexts/{context_id}"),
        ("GET", f"/contexts/{context_id}/messages"),
        ("POST", f"/contexts/{context_id}/messages"),
        ("GET", message),
        ("GET", f"{message}/content"),
        ("GET", f"{message}/chunks"),
        ("GET", f"/contexts/{context_id}/stream"),
        ("GET", f"/contexts/{context_id}/turns"),
        ("GET", f"/contexts/{context_id}/turns/{turn}"),
        ("POST", f"/contexts/{context_id}/turns/{turn}/cancel"),
        ("POST", f"/contexts/{context_id}/cancel"),
        ("POST", f"/contexts/{context_id}/retry"),
        ("GET", f"/contexts/{context_id}/transitions"),
        ("GET", "/machine"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
        ("GET", "/schema/openapi.json"),
        ("DELETE", f"/contexts/{context_id}"),
    ]
    bodies: dict[str, Any] = {"/contexts": {}, f"/contexts/{context_id}/messages": {
        "payload": {"type": "text", "content": "x"}}}  # fmt: skip
    wrong = []
    for method, path in routes:
        names = ("colour", "state", "data", "request", "context_id", "settings", "contexts")
        for name in names:
            if (path, name) == ("/contexts", "state"):
                continue
            body = None if method in ("GET", "DELETE") else bodies.get(path, {})
            with api.http.stream(method, f"{path}?{name}=x", json=body) as response:
                if response.status_code != 400 or name not in response.read().decode():
                    wrong.append((method, path, name, response.status_code))
    assert wrong == []


def test_a_text_that_looks_like_json_is_only_a_text(api: Api, context_id: str) -> None:
    """An object without `script`, a list, a number: plain text to the scripted provider (§13)."""
    for text in ('{"a": 1}', "[1]", "5", "null", '{"script'):
        message = api.reply(context_id, text)
        assert api.text(context_id, message["id"]) == f"You said: {text}"


def test_a_lost_answer_costs_nothing(api: Api, context_id: str) -> None:
    """A client that hangs up after sending has sent; its turn runs without it."""
    body = json.dumps({"payload": {"type": "text", "content": "hi"}, "message_id": "gone"}).encode()
    with (
        httpx.Client(base_url=api.url) as client,
        client.stream(
            "POST",
            f"/contexts/{context_id}/messages",
            content=body,
            headers={"content-type": "application/json"},
        ) as response,
    ):
        assert response.status_code == 202
    turn = api.message(context_id, "gone")["turn_id"]
    assert api.ended(context_id, turn)["status"] == "completed"
