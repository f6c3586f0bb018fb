"""§3.1 at the wire: workflows, which are listed, rendered when they are sent, or refused."""

from pathlib import Path

import pytest
from filing import BROKEN, PLAIN, play, post, sent, workflow
from tooling import Chat
from wire import Api, Json, invalid, ok, problem

WORKFLOW_FIELDS = {"name", "title", "description", "parameters", "error"}


PARAMETER_FIELDS = {
    "name", "type", "description", "required", "default", "choices", "min", "max", "max_length",
}  # fmt: skip


# Sent


def test_a_workflow_is_rendered(filing: Api, asking: str, chat: Chat) -> None:
    """When it is sent; the text is the message's, and what the model gets."""
    chat.replies = ["fine"]
    payload = {**workflow("review", topic="the {{ depth }}", depth=3), "display_text": "Review!"}
    answer, turn = play(filing, asking, payload)
    assert turn["status"] == "completed"
    message = filing.message(asking, answer["message_id"])
    assert (message["role"], message["kind"], message["final_sequence"]) == ("user", "workflow", 1)
    assert message["metadata"] == {
        "workflow": "review",
        "parameters": {"topic": "the {{ depth }}", "depth": 3},
        "display": "Review!",
    }
    text = "Review the {{ depth }} in 3 steps, kind."
    assert filing.text(asking, message["id"]).strip() == text
    assert sent(chat.requests[0]).strip() == text


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"topic": "x"}, "Review x in 2 steps, kind."),
        ({"topic": "é🙂", "depth": 5, "tone": "plain"}, "Review é🙂 in 5 steps, plain."),
        ({"topic": "x", "depth": 1.0, "twice": True}, "Review x in 1 steps, kind, twice."),
        ({"topic": "x" * 20, "weight": 0.5}, f"Review {'x' * 20} in 2 steps, kind."),
    ],
)
def test_parameters(filing: Api, parameters: Json, text: str) -> None:
    context_id = filing.create()
    answer = ok(post(filing, context_id, workflow("review", **parameters), respond=False), 201)
    assert filing.text(context_id, answer["message_id"]).strip() == text


@pytest.mark.parametrize(
    ("parameters", "fields"),
    [
        ({}, ["topic"]),
        ({"topic": None}, ["topic"]),
        ({"topic": 1}, ["topic"]),
        ({"topic": "x" * 21}, ["topic"]),
        ({"topic": "a\0b"}, ["topic"]),
        ({"topic": "x", "other": 1}, ["other"]),
        ({"topic": "x", "depth": 0}, ["depth"]),
        ({"topic": "x", "depth": 6}, ["depth"]),
        ({"topic": "x", "depth": 1.5}, ["depth"]),
        ({"topic": "x", "depth": True}, ["depth"]),
        ({"topic": "x", "depth": "2"}, ["depth"]),
        ({"topic": "x", "tone": "rude"}, ["tone"]),
        ({"topic": "x", "twice": 1}, ["twice"]),
        ({"topic": "x", "weight": "1"}, ["weight"]),
        ({"depth": 9, "tone": 1, "other": 1}, ["topic", "depth", "tone", "other"]),
    ],
)
def test_wrong_parameters(filing: Api, parameters: Json, fields: list[str]) -> None:
    """Each is named."""
    context_id = filing.create()
    body = problem(
        post(filing, context_id, workflow("review", **parameters)), 400, "invalid_request"
    )
    named = {error["field"] for error in body["errors"]}
    assert named == {f"payload.parameters.{field}" for field in fields}
    assert filing.context(context_id)["message_count"] == 0


@pytest.mark.parametrize("name", [*BROKEN, "blank", "endless"])
def test_a_workflow_that_cannot_be_used(filing: Api, name: str) -> None:
    """400, whether its file is broken or it makes no text or no end."""
    context_id = filing.create()
    invalid(post(filing, context_id, workflow(name)), "payload.workflow")
    assert filing.context(context_id)["message_count"] == 0


@pytest.mark.parametrize("name", ["nobody", "notes", ".hidden", "Review", "review.md", "x" * 64])
def test_an_unknown_workflow(filing: Api, name: str) -> None:
    context_id = filing.create()
    response = post(filing, context_id, workflow(name))
    assert problem(response, 404, "workflow_not_found")["workflow"] == name
    response = filing.http.get(f"/workflows/{name}")
    assert problem(response, 404, "workflow_not_found")["workflow"] == name


def test_a_repeat_after_the_workflow_has_gone(filing: Api, workflows_folder: Path) -> None:
    """The text is the one that was rendered; the same request is the same message."""
    path = workflows_folder / "passing.md"
    path.write_text(PLAIN.format(title="Old"))
    context_id = filing.create()
    answer, _ = play(filing, context_id, workflow("passing"), message_id="m1")
    path.write_text(PLAIN.format(title="Newer"))
    newer, _ = play(filing, context_id, workflow("passing"), message_id="m2")
    path.unlink()
    again = ok(post(filing, context_id, workflow("passing"), message_id="m1"), 202)
    assert (again["message_id"], again["turn_id"]) == ("m1", answer["turn_id"])
    assert "Old" in filing.text(context_id, "m1")
    assert "Newer" in filing.text(context_id, newer["message_id"])
    other = post(filing, context_id, workflow("passing", a=1), message_id="m1")
    problem(other, 409, "id_taken")
    problem(post(filing, context_id, workflow("passing")), 404, "workflow_not_found")


# Listed


def test_workflows_are_listed(filing: Api) -> None:
    """By name, broken ones too, with why."""
    listed = filing.walk("/workflows", limit=1000)
    assert [one["name"] for one in listed] == sorted([*BROKEN, "blank", "endless", "review"])
    for one in listed:
        assert set(one) == WORKFLOW_FIELDS
        assert (one["error"] is not None) == (one["name"] in BROKEN)
        assert ok(filing.http.get(f"/workflows/{one['name']}")) == one
    broken = next(one for one in listed if one["name"] == "broken-head")
    assert broken["parameters"] == []
    assert isinstance(broken["error"], str)


def test_a_workflow_says_what_it_takes(filing: Api) -> None:
    """Its parameters in the order of the file."""
    review = ok(filing.http.get("/workflows/review"))
    assert (review["title"], review["description"]) == ("Review", "Looks at something.")
    topic, depth, tone, twice, weight = review["parameters"]
    assert all(set(one) == PARAMETER_FIELDS for one in review["parameters"])
    assert (topic["name"], topic["type"], topic["required"]) == ("topic", "string", True)
    assert (topic["description"], topic["max_length"]) == ("what to look at", 20)
    assert (depth["type"], depth["default"], depth["min"], depth["max"]) == ("integer", 2, 1, 5)
    assert (depth["required"], depth["choices"], depth["max_length"]) == (False, None, None)
    assert (tone["type"], tone["choices"], tone["default"]) == ("enum", ["kind", "plain"], "kind")
    assert (twice["type"], twice["default"]) == ("boolean", False)
    assert (weight["type"], weight["required"], weight["default"]) == ("number", False, None)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
def test_workflows_in_pages(filing: Api, limit: int) -> None:
    """Each once, in the same order; the last page has no cursor."""
    whole = ok(filing.http.get("/workflows"))
    assert whole["next_cursor"] is None
    assert filing.walk("/workflows", limit=limit) == whole["items"]
    first = ok(filing.http.get("/workflows", params={"limit": limit}))
    assert (first["next_cursor"] is None) == (limit >= len(whole["items"]))


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"cursor": "x!"}, "cursor"),
        ({"a": 1}, "a"),
    ],
)
def test_wrong_questions(filing: Api, params: Json, field: str) -> None:
    invalid(filing.http.get("/workflows", params=params), field)


def test_a_server_without_workflows(api: Api) -> None:
    assert ok(api.http.get("/workflows")) == {"items": [], "next_cursor": None}
    problem(api.http.get("/workflows/review"), 404, "workflow_not_found")
    problem(post(api, api.create(), workflow("review")), 404, "workflow_not_found")
