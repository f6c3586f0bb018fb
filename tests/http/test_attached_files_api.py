"""§3.1 at the wire: the files of a message go where it goes, with a turn or without one."""

from pathlib import Path
from typing import Any

import pytest
from filing import HISTORY_BYTES
from tooling import Chat, ToolApi
from wire import Json, ok, problem


@pytest.fixture(scope="module")
def api(tooled: ToolApi, workspace: Path) -> ToolApi:
    (workspace / "a.md").write_text("alpha\n")
    (workspace / "b.md").write_text("beta\n")
    return tooled


@pytest.fixture
def context_id(api: ToolApi, chat: Chat) -> str:
    """A context that asks a model, which has not been asked anything."""
    chat.requests.clear()
    chat.replies[:] = ["fine"] * 5
    return api.create(provider="openai", tools=[])


def refer(api: ToolApi, context_id: str, *paths: str, status: int = 202, **more: Any) -> Json:
    body = {"payload": {"type": "file_reference", "paths": list(paths)}, **more}
    return ok(api.http.post(f"/contexts/{context_id}/messages", json=body), status)


def told(chat: Chat) -> list[str]:
    """What the model was sent last, in pieces: what follows on the same role is joined with a blank line."""
    text = "\n\n".join(message["content"] for message in chat.requests[-1]["messages"])
    return [piece.strip() for piece in text.split("\n\n")]


def hold(text: str, *marks: str) -> bool:
    return all(mark in text for mark in marks)


def test_a_note_with_files(api: ToolApi, context_id: str, chat: Chat) -> None:
    """`respond: false` stores what they hold at once, and the next turn's model sees it."""
    answer = refer(api, context_id, "a.md", "b.md", status=201, respond=False)
    user, first, second = api.messages(context_id, include="content")
    assert user["id"] == answer["message_id"]
    for message, path, text in ((first, "a.md", "alpha\n"), (second, "b.md", "beta\n")):
        assert (message["role"], message["kind"]) == ("tool", "file_reference")
        assert message["metadata"] == {"hidden": True, "path": path, "message_id": user["id"]}
        assert (message["turn_id"], message["status"]) == (None, "completed")
        assert text in message["content"]
    assert [first["parent_id"], second["parent_id"]] == [user["id"], first["id"]]
    api.run(context_id, "so?")
    alpha, beta, note, question = told(chat)
    assert hold(alpha, "a.md", "alpha")
    assert hold(beta, "b.md", "beta")
    assert (note, question) == ("a.md\nb.md", "so?")


def test_a_repeat_of_a_note_stores_nothing(api: ToolApi, context_id: str) -> None:
    """The same `message_id` and content: the files are there once."""
    for _ in range(2):
        refer(api, context_id, "a.md", status=201, respond=False, message_id="note")
    assert [one["kind"] for one in api.messages(context_id)] == ["file_reference"] * 2


def test_a_note_in_the_midst_of_a_turn(api: ToolApi, context_id: str, chat: Chat) -> None:
    """The model of the next turn has each file before the message that refers to it."""
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "scripted"}))
    turn_id = api.send(context_id, '{"script": [{"text": "on "}, {"delay_ms": 600000}]}')["turn_id"]
    api.opened(context_id)
    refer(api, context_id, "a.md", status=201, respond=False)
    api.cancel(context_id)
    assert api.ended(context_id, turn_id)["status"] == "cancelled"
    ok(api.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    api.run(context_id, "so?")
    *_, alpha, note, question = told(chat)
    assert hold(alpha, "a.md", "alpha")
    assert (note, question) == ("a.md", "so?")


def test_a_fork_from_a_message_with_files(api: ToolApi, context_id: str, chat: Chat) -> None:
    """They belong to it: another answer to it is given with them, as they were."""
    asked = refer(api, context_id, "a.md")
    api.ended(context_id, asked["turn_id"])
    first = told(chat)
    answer = api.send(context_id, "and?", parent_id=asked["message_id"])
    api.ended(context_id, answer["turn_id"])
    assert told(chat) == [*first, "and?"]
    assert api.context(context_id)["active_branch"] != "main"


def test_a_merged_message_brings_its_files(api: ToolApi, context_id: str, chat: Chat) -> None:
    """Also when only the message itself was named."""
    api.run(context_id, "hello")
    branch = f"/contexts/{context_id}/branches"
    ok(api.http.post(branch, json={"name": "side"}), 201)
    asked = refer(api, context_id, "a.md", branch="side")
    api.ended(context_id, asked["turn_id"])
    body = {"source": "side", "message_ids": [asked["message_id"]]}
    merged = ok(api.http.post(f"{branch}/main/merge", json=body))
    assert len(merged["added"]) == 1
    api.run(context_id, "so?")
    hello, _, alpha, reference, question = told(chat)
    assert hold(alpha, "a.md", "alpha")
    assert (hello, reference, question) == ("hello", "a.md", "so?")


def test_what_a_producer_calls_a_file_is_no_file(api: ToolApi, context_id: str, chat: Chat) -> None:
    """Only what the server has attached is moved to its message."""
    path = f"/contexts/{context_id}/messages"
    refer(api, context_id, "a.md", status=201, respond=False, message_id="note")
    for number, metadata in enumerate(({}, {"hidden": True}, {"hidden": True, "message_id": 5})):
        body = {"producer": {"id": "p"}, "role": "tool", "kind": "file_reference"}
        ok(api.http.put(f"{path}/m{number}", json={**body, "metadata": metadata}), 201)
        ok(api.http.post(f"{path}/m{number}/chunks", json={"content": f"own {number}"}))
        ok(api.http.post(f"{path}/m{number}/complete", json={}))
    api.run(context_id, "so?")
    alpha, *rest = told(chat)
    assert hold(alpha, "alpha")
    assert rest == ["a.md", "own 0", "own 1", "own 2", "so?"]


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "text", "content": "x", "display": "y" * 70_000},
        {"type": "file_reference", "paths": ["a.md"], "display_text": "y" * 70_000},
    ],
)
def test_what_is_shown_instead_is_bounded(api: ToolApi, context_id: str, payload: Json) -> None:
    """It comes with every list: 413, and nothing is stored."""
    response = api.http.post(f"/contexts/{context_id}/messages", json={"payload": payload})
    assert problem(response, 413, "payload_too_large")["limit_bytes"] == 65_536
    assert api.messages(context_id) == []


def test_files_count_with_their_message(filing: ToolApi, files_folder: Path, chat: Chat) -> None:
    """Wherever they are brought from, the bound of what is sent holds (§6), and the newest are kept."""
    chat.replies.append("fine")
    context_id = filing.create(provider="openai", tools=[])
    branch = f"/contexts/{context_id}/branches"
    ok(filing.http.post(branch, json={"name": "side"}), 201)
    notes = []
    for number in range(6):
        name = f"bound-{number}.md"
        (files_folder / name).write_text(f"mark-{number} " + "x" * 400)
        note = refer(filing, context_id, name, status=201, respond=False, branch="side")
        notes.append(note["message_id"])
    body = {"source": "side", "message_ids": notes}
    assert len(ok(filing.http.post(f"{branch}/main/merge", json=body))["added"]) == 6
    filing.run(context_id, "so?")
    text = "".join(str(message["content"]) for message in chat.requests[-1]["messages"])
    assert len(text) < HISTORY_BYTES
    shown = [number for number in range(6) if f"mark-{number}" in text]
    assert shown == [number for number in range(6) if f"bound-{number}.md" in text]
    assert shown
    assert shown == list(range(shown[0], 6))
    assert shown[0] > 0
