"""§3.1 at the wire: references to files and workflows, what is stored of them, what a model is sent."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tooling import Chat
from wire import SILENT, Api, Json, invalid, ok, problem, script, until

FILE_BYTES = 600
HISTORY_BYTES = 2000

WORKFLOW_FIELDS = {"name", "title", "description", "parameters", "error"}
PARAMETER_FIELDS = {
    "name", "type", "description", "required", "default", "choices", "min", "max", "max_length",
}  # fmt: skip
REVIEW = """---
title: Review
description: Looks at something.
parameters:
  topic: {type: string, description: what to look at, max_length: 20}
  depth: {type: integer, default: 2, min: 1, max: 5}
  tone: {type: enum, choices: [kind, plain], default: kind}
  twice: {type: boolean, default: false}
  weight: {type: number, required: false}
---
Review {{ topic }} in {{ depth }} steps, {{ tone }}{% if twice %}, twice{% endif %}.
"""
PLAIN = "---\ntitle: {title}\n---\n{title} text\n"
BROKEN = {
    "broken-body": "---\ntitle: x\n---\n{% for %}\n",
    "broken-head": "no front matter\n",
    "broken-name": "---\ntitle: x\n---\n{{ unknown }}\n",
}


@pytest.fixture(scope="module")
def model() -> Iterator[Chat]:
    with Chat().serving() as model:
        yield model


@pytest.fixture
def chat(model: Chat) -> Chat:
    """A model that has not been asked anything, and has answers enough."""
    model.requests.clear()
    model.replies[:] = ["fine"] * 20
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace."""
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workflows, of which some are broken."""
    folder = tmp_path_factory.mktemp("workflows")
    (folder / "review.md").write_text(REVIEW)
    (folder / "blank.md").write_text("---\n---\n{% if false %}x{% endif %}\n")
    (folder / "endless.md").write_text(
        "---\n---\n{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}\n"
    )
    for name, text in BROKEN.items():
        (folder / f"{name}.md").write_text(text)
    (folder / ".hidden.md").write_text(PLAIN.format(title="hidden"))
    (folder / "notes.txt").write_text("not one")
    return folder


@pytest.fixture(scope="module")
def filing(make_server: Any, root: Path, folder: Path, model: Chat) -> Iterator[Api]:
    """A server with a workspace, workflows, small limits, and a model to ask."""
    server = make_server(
        workspace=root,
        workflows=folder,
        file_bytes_max=FILE_BYTES,
        history_bytes_max=HISTORY_BYTES,
        openai_base_url=model.url,
        openai_api_key="none",
        model="fake",
    )
    client = Api(server.url)
    yield client
    client.close()


@pytest.fixture
def asking(filing: Api) -> str:
    """A context that asks the model."""
    return filing.create(provider="openai", tools=[])


def post(api: Api, context_id: str, payload: Json, **more: Any) -> httpx.Response:
    return api.http.post(f"/contexts/{context_id}/messages", json={"payload": payload, **more})


def files(*paths: str, **more: Any) -> Json:
    return {"type": "file_reference", "paths": list(paths), **more}


def workflow(name: str, /, **parameters: Any) -> Json:
    return {"type": "workflow", "workflow": name, "parameters": parameters}


def play(api: Api, context_id: str, payload: Json, **more: Any) -> tuple[Json, Json]:
    """Sends and waits for the turn's end: the answer and the turn."""
    answer = ok(post(api, context_id, payload, **more), 202)
    return answer, api.ended(context_id, answer["turn_id"])


def attached(api: Api, context_id: str) -> list[Json]:
    """The messages that hold what files held, with their text."""
    listed = api.messages(context_id, include="content")
    return [one for one in listed if (one["role"], one["kind"]) == ("tool", "file_reference")]


def sent(request: Json) -> str:
    """All that a model was sent in one request, as one text."""
    return "\n".join(str(message["content"]) for message in request["messages"])


# References to files


def test_files_are_stored_and_shown(filing: Api, asking: str, chat: Chat, root: Path) -> None:
    """As hidden messages between the user's and the answer; the model has them before the message."""
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "plan.md").write_text("first step\nsecond step\n")
    (root / "code.py").write_text("print('é🙂')\n")
    paths = ["docs/plan.md", "code.py"]
    answer, turn = play(filing, asking, files(*paths))
    assert turn["status"] == "completed"
    user, first, second, reply = filing.messages(asking, include="content")
    assert (user["role"], user["kind"], user["final_sequence"]) == ("user", "file_reference", 1)
    assert user["id"] == answer["message_id"]
    assert user["content"] == "docs/plan.md\ncode.py"
    assert user["metadata"] == {"paths": paths}
    for message, path, text in ((first, paths[0], "second step\n"), (second, paths[1], "é🙂")):
        assert (message["role"], message["kind"]) == ("tool", "file_reference")
        assert message["metadata"] == {"hidden": True, "path": path}
        assert (message["status"], message["final_sequence"]) == ("completed", 1)
        assert message["turn_id"] == turn["id"]
        assert text in message["content"]
        assert filing.text(asking, message["id"]) == message["content"]
    chain = [user["id"], first["id"], second["id"]]
    assert [first["parent_id"], second["parent_id"], reply["parent_id"]] == chain
    assert turn["message_ids"] == [*chain, reply["id"]]
    (request,) = chat.requests
    text = sent(request)
    places = [text.index(part) for part in ("second step", "é🙂", "docs/plan.md\ncode.py")]
    assert places == sorted(places)
    assert request["messages"][-1]["role"] == "user"


def test_files_are_signalled(filing: Api, root: Path) -> None:
    """A reader that attaches is told of them as of the turn's other messages."""
    (root / "told.md").write_text("told\n")
    context_id = filing.create()
    play(filing, context_id, files("told.md"))
    (message,) = attached(filing, context_id)
    frames = [frame for frame in filing.attach(context_id) if frame.get("message_id")]
    (frame,) = [frame for frame in frames if frame["message_id"] == message["id"]]
    assert (frame.type, frame["role"], frame["kind"]) == (
        "message_completed", "tool", "file_reference",
    )  # fmt: skip


def test_display_text(filing: Api, asking: str, chat: Chat, root: Path) -> None:
    """Stands in place of the paths; the files are shown all the same."""
    (root / "a.md").write_text("the secret word is plum\n")
    answer, _ = play(filing, asking, files("a.md", display_text="What is the word?"))
    message = filing.message(asking, answer["message_id"])
    assert message["metadata"] == {"paths": ["a.md"], "display": "What is the word?"}
    assert filing.text(asking, message["id"]) == "What is the word?"
    text = sent(chat.requests[0])
    assert text.index("plum") < text.index("What is the word?")


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ("", ["one", "two", "three", "four"]),
        (":1", ["one"]),
        (":4", ["four"]),
        (":2-3", ["two", "three"]),
        (":3-3", ["three"]),
        (":3-99", ["three", "four"]),
        (":0002", ["two"]),
    ],
)
def test_lines(filing: Api, root: Path, lines: str, shown: list[str]) -> None:
    """From 1, both included, up to the file's end."""
    (root / "lines.txt").write_text("<one>\n<two>\n<three>\n<four>")
    context_id = filing.create()
    play(filing, context_id, files(f"lines.txt{lines}"))
    (message,) = attached(filing, context_id)
    assert message["metadata"]["path"] == f"lines.txt{lines}"
    every = ["one", "two", "three", "four"]
    assert [word for word in every if f"<{word}>" in message["content"]] == shown


@pytest.mark.parametrize("text", ["x" * 5000, "a line\n" * 900, "é🙂" * 900, "\n" * 5000])
def test_a_large_file_is_cut(filing: Api, root: Path, text: str) -> None:
    """At most the bound in bytes, with the file's beginning, and whole characters."""
    (root / "large.txt").write_text(text)
    context_id = filing.create()
    play(filing, context_id, files("large.txt"))
    (message,) = attached(filing, context_id)
    assert len(message["content"].encode()) <= FILE_BYTES
    assert text[:80] in message["content"]
    assert "\ufffd" not in message["content"]


def test_the_bound_is_of_each_file(filing: Api, root: Path) -> None:
    """And lines are counted in the file, not in what is shown of it."""
    (root / "large.txt").write_text("".join(f"line {n}\n" for n in range(1, 1001)))
    context_id = filing.create()
    play(filing, context_id, files("large.txt", "large.txt:900-902"))
    whole, part = attached(filing, context_id)
    assert "line 900\n" not in whole["content"]
    assert "line 900\nline 901\nline 902\n" in part["content"]


@pytest.mark.parametrize("data", [b"", b"caf\xe9 \xff\n", b"no newline at the end"])
def test_odd_files(filing: Api, root: Path, data: bytes) -> None:
    """Empty ones and those of other encodings can be referred to."""
    (root / "odd.txt").write_bytes(data)
    context_id = filing.create()
    _, turn = play(filing, context_id, files("odd.txt"))
    assert turn["status"] == "completed"
    (message,) = attached(filing, context_id)
    assert data.decode(errors="replace") in message["content"]


def test_more_files_than_history_has_room_for(
    filing: Api, asking: str, chat: Chat, root: Path
) -> None:
    """What the user said is the newest of all, and goes to the model whatever the files hold (§6)."""
    (root / "large.txt").write_text("x" * 5000)
    play(filing, asking, files(*["large.txt"] * 6, display_text="Sum this up."))
    assert len(attached(filing, asking)) == 6
    assert "Sum this up." in sent(chat.requests[0])


def test_files_survive_a_retry(filing: Api, chat: Chat, root: Path) -> None:
    """They are part of what was asked, not of the answer that failed (§6)."""
    (root / "kept.md").write_text("the secret word is fig\n")
    context_id = filing.create(tools=[])
    _, turn = play(filing, context_id, files("kept.md", display_text=script({"error": "fatal"})))
    assert turn["status"] == "failed"
    ok(filing.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    again = ok(filing.http.post(f"/contexts/{context_id}/retry"), 202)
    assert filing.ended(context_id, again["turn_id"])["status"] == "completed"
    filing.run(context_id, "and now?")
    retried, later = map(sent, chat.requests)
    assert "fig" in retried
    assert "fig" in later


def test_files_survive_broken_attempts(filing: Api, root: Path) -> None:
    """Read once a turn, and listed once, however often the model is asked."""
    (root / "once.md").write_text("once\n")
    context_id = filing.create()
    steps = script({"text": "part "}, {"error": "transient", "times": 2}, {"text": "whole"})
    _, turn = play(filing, context_id, files("once.md", display_text=steps))
    assert (turn["status"], turn["attempt"]) == ("completed", 3)
    assert len(attached(filing, context_id)) == 1
    roles = [message["role"] for message in filing.messages(context_id)]
    assert roles == ["user", "tool", "assistant"]


def test_later_turns_see_the_files_as_they_were(
    filing: Api, asking: str, chat: Chat, root: Path
) -> None:
    """What was stored is what is shown, also when the file has changed."""
    (root / "changing.md").write_text("old words\n")
    play(filing, asking, files("changing.md"))
    (root / "changing.md").write_text("new words\n")
    filing.run(asking, "and now?")
    assert "old words" in sent(chat.requests[1])
    assert "new words" not in sent(chat.requests[1])


@pytest.fixture
def waiting(filing: Api, chat: Chat, root: Path) -> tuple[str, str]:
    """A context that asks the model next, with a queued reference to `queued.md`: it, and the turn."""
    (root / "queued.md").write_text("at the send\n")
    context_id = filing.create(tools=[])
    filing.send(context_id, SILENT)
    filing.in_state(context_id, "awaiting_llm_response")
    ok(filing.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    answer = ok(post(filing, context_id, files("queued.md")), 202)
    assert answer["queued"] is True
    assert attached(filing, context_id) == []
    return context_id, answer["turn_id"]


def test_a_queued_reference_is_read_when_its_turn_starts(
    filing: Api, waiting: tuple[str, str], chat: Chat, root: Path
) -> None:
    """The files as they are then."""
    context_id, turn_id = waiting
    (root / "queued.md").write_text("at the start\n")
    filing.cancel(context_id)
    assert filing.ended(context_id, turn_id)["status"] == "completed"
    (message,) = attached(filing, context_id)
    assert "at the start" in message["content"]
    assert "at the start" in sent(chat.requests[0])
    assert "at the send" not in sent(chat.requests[0])


@pytest.mark.parametrize("becomes", ["nothing", "folder", "link", "pipe"])
def test_a_queued_reference_whose_file_has_gone(
    filing: Api, waiting: tuple[str, str], chat: Chat, root: Path, becomes: str
) -> None:
    """The turn runs, and the model is told in words."""
    context_id, turn_id = waiting
    path = root / "queued.md"
    path.unlink()
    _become(path, becomes)
    try:
        filing.cancel(context_id)
        assert filing.ended(context_id, turn_id)["status"] == "completed"
    finally:
        _remove(path)
    (message,) = attached(filing, context_id)
    assert message["metadata"] == {"hidden": True, "path": "queued.md"}
    assert "queued.md" in message["content"]
    assert "at the send" not in message["content"]
    assert message["content"] in sent(chat.requests[0])


def _become(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.with_name("target.md").write_text("at the send\n")
        path.symlink_to("target.md")
    elif kind == "pipe":
        os.mkfifo(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_a_repeat_after_the_file_has_gone(filing: Api, root: Path) -> None:
    """The same answer, nothing more is stored; what is new is refused."""
    path = root / "gone.md"
    path.write_text("here\n")
    context_id = filing.create()
    answer, _ = play(filing, context_id, files("gone.md"), message_id="m1")
    until(lambda: filing.context(context_id)["state"] == "idle")
    before = filing.context(context_id)["revision"]
    path.unlink()
    again = ok(post(filing, context_id, files("gone.md"), message_id="m1"), 202)
    assert (again["message_id"], again["turn_id"]) == ("m1", answer["turn_id"])
    assert again["revision"] == before
    assert len(attached(filing, context_id)) == 1
    invalid(post(filing, context_id, files("gone.md"), message_id="m2"), "payload.paths[0]")
    other = post(filing, context_id, files("gone.md:1"), message_id="m1")
    assert problem(other, 409, "id_taken")["id"] == "m1"
    assert filing.context(context_id)["revision"] == before


BAD_FILES = [
    ({"type": "file_reference"}, "payload.paths"),
    (files(), "payload.paths"),
    (files(*["here.md"] * 101), "payload.paths"),
    ({"type": "file_reference", "paths": "here.md"}, "payload.paths"),
    ({"type": "file_reference", "paths": [1]}, "payload.paths[0]"),
    (files(""), "payload.paths[0]"),
    (files("here.md", "a\0b"), "payload.paths[1]"),
    (files("here.md", "missing.md"), "payload.paths[1]"),
    (files("here.md", "here.md", "x" * 5000), "payload.paths[2]"),
    (files("x" * 300), "payload.paths[0]"),
    (files("folder"), "payload.paths[0]"),
    (files("."), "payload.paths[0]"),
    (files("folder/"), "payload.paths[0]"),
    (files("link.md"), "payload.paths[0]"),
    (files("linked/inner.md"), "payload.paths[0]"),
    (files("pipe"), "payload.paths[0]"),
    (files("binary"), "payload.paths[0]"),
    (files("../here.md"), "payload.paths[0]"),
    (files("folder/../here.md"), "payload.paths[0]"),
    (files("/etc/hostname"), "payload.paths[0]"),
    (files("folder\\inner.md"), "payload.paths[0]"),
    (files("here.md/inner.md"), "payload.paths[0]"),
    (files("here.md:0"), "payload.paths[0]"),
    (files("here.md:3"), "payload.paths[0]"),
    (files("here.md:2-1"), "payload.paths[0]"),
    (files("here.md:"), "payload.paths[0]"),
    (files("here.md:1-"), "payload.paths[0]"),
    (files("here.md:-2"), "payload.paths[0]"),
    (files("here.md:99999999999999999999"), "payload.paths[0]"),
    (files(":1"), "payload.paths[0]"),
    (files("here.md", content="x"), "payload.content"),
    (files("here.md", display_text=1), "payload.display_text"),
    (files("here.md", display_text="a\0b"), "payload.display_text"),
    ({"type": "workflow"}, "payload.workflow"),
    ({"type": "workflow", "workflow": "a b"}, "payload.workflow"),
    ({"type": "workflow", "workflow": 1}, "payload.workflow"),
    ({"type": "workflow", "workflow": "review", "parameters": []}, "payload.parameters"),
    ({"type": "workflow", "workflow": "review", "paths": []}, "payload.paths"),
    ({"type": "other", "content": "x"}, "payload.type"),
    ({"content": "x"}, "payload.type"),
]


@pytest.mark.parametrize(("payload", "field"), BAD_FILES)
def test_refused_payloads(filing: Api, root: Path, payload: Json, field: str) -> None:
    """400 that names the field; nothing is stored."""
    _furnish(root)
    context_id = filing.create()
    invalid(post(filing, context_id, payload), field)
    invalid(post(filing, context_id, payload, respond=False), field)
    context = filing.context(context_id)
    assert (context["revision"], context["message_count"]) == (1, 0)


def _furnish(root: Path) -> None:
    """What there is to refer to: a file, a folder, a pipe, links, and a file that is no text."""
    (root / "here.md").write_text("one\ntwo\n")
    (root / "folder").mkdir(exist_ok=True)
    (root / "folder" / "inner.md").write_text("inner\n")
    (root / "binary").write_bytes(b"a\0b")
    if not (root / "pipe").exists():
        os.mkfifo(root / "pipe")
        (root / "link.md").symlink_to("here.md")
        (root / "linked").symlink_to("folder")


def test_without_a_workspace(api: Api) -> None:
    """A reference is 400; there is nothing to refer to."""
    context_id = api.create()
    body = problem(post(api, context_id, files("a.md")), 400, "invalid_request")
    assert all(error["field"].startswith("payload") for error in body["errors"]), body
    assert api.context(context_id)["message_count"] == 0


def test_an_unknown_context_comes_first(filing: Api) -> None:
    """404 whatever is wrong with the payload's files."""
    problem(post(filing, "nobody", files("missing.md")), 404, "context_not_found")
    problem(post(filing, "nobody", workflow("missing")), 404, "context_not_found")


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_files_are_attached_whatever_the_role(filing: Api, root: Path, role: str) -> None:
    """Of whom the message is makes no difference."""
    (root / "a.md").write_text("a\n")
    context_id = filing.create()
    answer, _ = play(filing, context_id, files("a.md"), role=role)
    found = [
        one["metadata"]["path"]
        for one in attached(filing, context_id)
        if one["id"] != answer["message_id"]
    ]
    assert found == ["a.md"]


# Workflows


def test_a_workflow_is_rendered(filing: Api, asking: str, chat: Chat) -> None:
    """When it is sent; the text is the message's, and what the model gets."""
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


def test_a_repeat_after_the_workflow_has_gone(filing: Api, folder: Path) -> None:
    """The text is the one that was rendered; the same request is the same message."""
    path = folder / "passing.md"
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
