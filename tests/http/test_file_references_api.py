"""§3.1 at the wire: references to files, what is stored of them, what a model is sent."""

import os
from pathlib import Path

import pytest
from filing import FILE_BYTES, attached, files, play, post, sent
from tooling import Chat
from wire import SILENT, Api, invalid, ok, problem, script, until


@pytest.fixture
def chat(chat: Chat) -> Chat:
    """The model, with answers enough."""
    chat.replies += ["fine"] * 20
    return chat


# What is stored and shown


def test_files_are_stored_and_shown(
    filing: Api, asking: str, chat: Chat, files_folder: Path
) -> None:
    """As hidden messages between the user's and the answer; the model has them before the message."""
    (files_folder / "docs").mkdir(exist_ok=True)
    (files_folder / "docs" / "plan.md").write_text("first step\nsecond step\n")
    (files_folder / "code.py").write_text("print('é🙂')\n")
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
        assert message["metadata"] == {
            "hidden": True,
            "path": path,
            "message_id": answer["message_id"],
        }
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


def test_files_are_signalled(filing: Api, files_folder: Path) -> None:
    """A reader that attaches is told of them as of the turn's other messages."""
    (files_folder / "told.md").write_text("told\n")
    context_id = filing.create()
    play(filing, context_id, files("told.md"))
    (message,) = attached(filing, context_id)
    frames = [frame for frame in filing.attach(context_id) if frame.get("message_id")]
    (frame,) = [frame for frame in frames if frame["message_id"] == message["id"]]
    assert (frame.type, frame["role"], frame["kind"]) == (
        "message_completed", "tool", "file_reference",
    )  # fmt: skip


def test_display_text(filing: Api, asking: str, chat: Chat, files_folder: Path) -> None:
    """Stands in place of the paths; the files are shown all the same."""
    (files_folder / "a.md").write_text("the secret word is plum\n")
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
def test_lines(filing: Api, files_folder: Path, lines: str, shown: list[str]) -> None:
    """From 1, both included, up to the file's end."""
    (files_folder / "lines.txt").write_text("<one>\n<two>\n<three>\n<four>")
    context_id = filing.create()
    play(filing, context_id, files(f"lines.txt{lines}"))
    (message,) = attached(filing, context_id)
    assert message["metadata"]["path"] == f"lines.txt{lines}"
    every = ["one", "two", "three", "four"]
    assert [word for word in every if f"<{word}>" in message["content"]] == shown


@pytest.mark.parametrize("text", ["x" * 5000, "a line\n" * 900, "é🙂" * 900, "\n" * 5000])
def test_a_large_file_is_cut(filing: Api, files_folder: Path, text: str) -> None:
    """At most the bound in bytes, with the file's beginning, and whole characters."""
    (files_folder / "large.txt").write_text(text)
    context_id = filing.create()
    play(filing, context_id, files("large.txt"))
    (message,) = attached(filing, context_id)
    assert len(message["content"].encode()) <= FILE_BYTES
    assert text[:80] in message["content"]
    assert "\ufffd" not in message["content"]


def test_the_bound_is_of_each_file(filing: Api, files_folder: Path) -> None:
    """And lines are counted in the file, not in what is shown of it."""
    (files_folder / "large.txt").write_text("".join(f"line {n}\n" for n in range(1, 1001)))
    context_id = filing.create()
    play(filing, context_id, files("large.txt", "large.txt:900-902"))
    whole, part = attached(filing, context_id)
    assert "line 900\n" not in whole["content"]
    assert "line 900\nline 901\nline 902\n" in part["content"]


@pytest.mark.parametrize("data", [b"", b"caf\xe9 \xff\n", b"no newline at the end"])
def test_odd_files(filing: Api, files_folder: Path, data: bytes) -> None:
    """Empty ones and those of other encodings can be referred to."""
    (files_folder / "odd.txt").write_bytes(data)
    context_id = filing.create()
    _, turn = play(filing, context_id, files("odd.txt"))
    assert turn["status"] == "completed"
    (message,) = attached(filing, context_id)
    assert data.decode(errors="replace") in message["content"]


def test_more_files_than_history_has_room_for(
    filing: Api, asking: str, chat: Chat, files_folder: Path
) -> None:
    """What the user said is the newest of all, and goes to the model whatever the files hold (§6)."""
    (files_folder / "large.txt").write_text("x" * 5000)
    play(filing, asking, files(*["large.txt"] * 6, display_text="Sum this up."))
    assert len(attached(filing, asking)) == 6
    assert "Sum this up." in sent(chat.requests[0])


def test_files_survive_a_retry(filing: Api, chat: Chat, files_folder: Path) -> None:
    """They are part of what was asked, not of the answer that failed (§6)."""
    (files_folder / "kept.md").write_text("the secret word is fig\n")
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


def test_files_survive_broken_attempts(filing: Api, files_folder: Path) -> None:
    """Read once a turn, and listed once, however often the model is asked."""
    (files_folder / "once.md").write_text("once\n")
    context_id = filing.create()
    steps = script({"text": "part "}, {"error": "transient", "times": 2}, {"text": "whole"})
    _, turn = play(filing, context_id, files("once.md", display_text=steps))
    assert (turn["status"], turn["attempt"]) == ("completed", 3)
    assert len(attached(filing, context_id)) == 1
    roles = [message["role"] for message in filing.messages(context_id)]
    assert roles == ["user", "tool", "assistant"]


def test_later_turns_see_the_files_as_they_were(
    filing: Api, asking: str, chat: Chat, files_folder: Path
) -> None:
    """What was stored is what is shown, also when the file has changed."""
    (files_folder / "changing.md").write_text("old words\n")
    play(filing, asking, files("changing.md"))
    (files_folder / "changing.md").write_text("new words\n")
    filing.run(asking, "and now?")
    assert "old words" in sent(chat.requests[1])
    assert "new words" not in sent(chat.requests[1])


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_files_are_attached_whatever_the_role(filing: Api, files_folder: Path, role: str) -> None:
    """Of whom the message is makes no difference."""
    (files_folder / "a.md").write_text("a\n")
    context_id = filing.create()
    answer, _ = play(filing, context_id, files("a.md"), role=role)
    found = [
        one["metadata"]["path"]
        for one in attached(filing, context_id)
        if one["id"] != answer["message_id"]
    ]
    assert found == ["a.md"]


# Files that change


@pytest.fixture
def waiting(filing: Api, chat: Chat, files_folder: Path) -> tuple[str, str]:
    """A context that asks the model next, with a queued reference to `queued.md`: it, and the turn."""
    (files_folder / "queued.md").write_text("at the send\n")
    context_id = filing.create(tools=[])
    filing.send(context_id, SILENT)
    filing.in_state(context_id, "awaiting_llm_response")
    ok(filing.http.patch(f"/contexts/{context_id}", json={"provider": "openai"}))
    answer = ok(post(filing, context_id, files("queued.md")), 202)
    assert answer["queued"] is True
    assert attached(filing, context_id) == []
    return context_id, answer["turn_id"]


def test_a_queued_reference_is_read_when_its_turn_starts(
    filing: Api, waiting: tuple[str, str], chat: Chat, files_folder: Path
) -> None:
    """The files as they are then."""
    context_id, turn_id = waiting
    (files_folder / "queued.md").write_text("at the start\n")
    filing.cancel(context_id)
    assert filing.ended(context_id, turn_id)["status"] == "completed"
    (message,) = attached(filing, context_id)
    assert "at the start" in message["content"]
    assert "at the start" in sent(chat.requests[0])
    assert "at the send" not in sent(chat.requests[0])


@pytest.mark.parametrize("becomes", ["nothing", "folder", "link", "pipe"])
def test_a_queued_reference_whose_file_has_gone(
    filing: Api, waiting: tuple[str, str], chat: Chat, files_folder: Path, becomes: str
) -> None:
    """The turn runs, and the model is told in words."""
    context_id, turn_id = waiting
    path = files_folder / "queued.md"
    path.unlink()
    _become(path, becomes)
    try:
        filing.cancel(context_id)
        assert filing.ended(context_id, turn_id)["status"] == "completed"
    finally:
        _remove(path)
    (message,) = attached(filing, context_id)
    assert (message["metadata"]["hidden"], message["metadata"]["path"]) == (True, "queued.md")
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


def test_a_repeat_after_the_file_has_gone(filing: Api, files_folder: Path) -> None:
    """The same answer, nothing more is stored; what is new is refused."""
    path = files_folder / "gone.md"
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
