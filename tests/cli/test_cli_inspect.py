"""`ls`, `show` and `cancel`."""

import json
from collections.abc import Callable

from cli_parts import Ran, Screen, Served

Contextd = Callable[..., Ran]


def test_ls_lists_every_page_a_context_a_line(fake: Served, contextd: Contextd) -> None:
    """However many pages there are, and whatever a title holds."""
    fake.page_limit = 2
    fake.add("plain", title="Tea")
    fake.add("odd", title="[red]x[/]\n\x1b[31m" + "long " * 60, state="failed")
    fake.add("bare")
    lines = contextd("ls").out.decode().splitlines()
    assert lines[0].split() == ["ID", "STATE", "MESSAGES", "UPDATED", "TITLE"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["plain", "idle", "0"],
        ["odd", "failed", "0"],
        ["bare", "idle", "0"],
    ]
    assert "[red]x[/] ␛[31mlong long" in lines[2]
    assert "\x1b" not in "".join(lines)


def test_ls_filters_by_state(fake: Served, contextd: Contextd) -> None:
    """--state may be repeated."""
    for id_, state in (("a", "idle"), ("b", "failed"), ("c", "producing")):
        fake.add(id_, state=state)
    found = json.loads(contextd("ls", "--json", "--state", "idle", "--state", "failed").out)
    assert [context["id"] for context in found] == ["a", "b"]
    assert json.loads(contextd("ls", "--json", "--state", "nowhere").out) == []


def test_show_has_the_context_and_the_text(fake: Served, contextd: Contextd) -> None:
    """Fields, then each message under its header, all pages and all of the text."""
    fake.page_limit, fake.page_chunks_max = 1, 1
    context = fake.add("c", title="Tea")
    fake.append(context, "m", "He", "llo\n", role="user")
    fake.append(context, "n", "ha", "lf")
    fake.close(context, "m")
    fake.close(context, "n", "cancelled")
    out = contextd("show", "c").out.decode()
    assert "title           Tea\n" in out
    messages = "── user text m\nHello\n── assistant text n\nhalf\n· cancelled\n"
    assert out.endswith(messages)


def test_show_json_is_one_document(fake: Served, contextd: Contextd) -> None:
    """The context and its messages, with text and bytes as they are."""
    fake.append(fake.add("c"), "m", "a\x1b", "b")
    shown = json.loads(contextd("show", "c", "--json").out)
    assert shown["context"]["id"] == "c"
    assert [message["content"] for message in shown["messages"]] == ["a\x1bb"]


def test_show_on_a_screen_shows_control_characters(
    fake: Served, on_screen: Callable[..., Screen]
) -> None:
    """Neither a title nor a text can drive the terminal."""
    fake.append(fake.add("c", title="\x1b[2Jt"), "m", "\x1b[2Jx")
    screen = on_screen("show", "c")
    seen = screen.read_to_end()
    assert screen.process.returncode == 0
    assert "␛[2Jt" in seen
    assert "␛[2Jx" in seen
    assert "\x1b[2J" not in seen


def test_cancel_says_what_it_did(fake: Served, contextd: Contextd) -> None:
    """Nothing to cancel is no error; --turn names the turn."""
    fake.add("c")
    assert contextd("cancel", "c").out == b"nothing to cancel; the context is idle\n"
    fake.script, fake.rate_s = [("text", "half"), *[("wait", "")] * 1000], 0.05
    turn_id = contextd("send", "c", "hi", "--no-wait").out.decode().strip()
    ran = contextd("cancel", "c", "--turn", "another")
    assert (ran.code, ran.out[:17]) == (0, b"nothing to cancel")
    ran = contextd("cancel", "c", "--turn", turn_id)
    assert ran.out.decode() == f"cancelled turn {turn_id}; the context is idle\n"
