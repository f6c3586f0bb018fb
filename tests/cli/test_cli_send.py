"""`contextd send`: exactly the answer, an honest exit code, and Ctrl-C that cancels."""

import json
import signal
import subprocess
from collections.abc import Callable

import pytest
from cli_parts import Ran, Screen, Served

Contextd = Callable[..., Ran]
Command = tuple[list[str], dict[str, str]]


@pytest.fixture(autouse=True)
def _context(fake: Served) -> None:
    fake.add("c")


def test_a_pipe_gets_exactly_the_answer(fake: Served, contextd: Contextd) -> None:
    """Every byte of the text, whatever it is, and not one more."""
    text = "é 🙂\r\n\t\x1b[31mred\x07\u2028 \x9b end"
    fake.script = [("text", part) for part in (text[:7], text[7:11], text[11:])]
    ran = contextd("send", "c", "hi")
    assert (ran.code, ran.out, ran.err) == (0, text.encode(), "")


def test_messages_of_one_answer_stand_on_lines_of_their_own(
    fake: Served, contextd: Contextd
) -> None:
    """A new line is added between two messages, if there is none; thoughts and tools are left out."""
    fake.script = [
        ("text", "one"),
        ("thinking", "hm"),
        ("text", "two\n"),
        ("tool_call", "{}"),
        ("text", "three"),
    ]
    assert contextd("send", "c", "hi").out == b"one\ntwo\nthree"


def test_a_broken_attempt_is_not_part_of_the_answer(fake: Served, contextd: Contextd) -> None:
    """What an interrupted message had is not piped (§6)."""
    fake.script = [("text", "You "), ("interrupt", ""), ("text", "You "), ("text", "said")]
    assert contextd("send", "c", "hi").out == b"You said"


def test_faults_on_the_way_change_nothing(fake: Served, contextd: Contextd) -> None:
    """Cut streams, lost answers and refused pulls: the same bytes and one turn."""
    fake.faults.refuse_sends = [503]
    fake.faults.cut_streams = [1, 3]
    fake.faults.refuse_pulls = [503]
    fake.faults.cut_pulls = 1
    ran = contextd("send", "c", "to be or not to be")
    assert (ran.code, ran.out) == (0, b"You said: to be or not to be")
    assert len(fake.contexts["c"].turns) == 1


def test_only_the_turns_own_messages_are_shown(fake: Served, contextd: Contextd) -> None:
    """Another turn's answer that grows at the same time is somebody else's."""
    other = fake.append(fake.contexts["c"], "other", "not mine", turn_id="t-other")
    fake.script = [("text", "mine")]
    ran = contextd("send", "c", "hi")
    assert ran.out == b"mine"
    lines = contextd("send", "c", "hi", "--json").out.splitlines()
    assert other.id not in {json.loads(line).get("message_id") for line in lines}


def test_a_failed_turn_is_exit_code_1(fake: Served, contextd: Contextd) -> None:
    """What was written is kept, and the reason is one line on standard error."""
    fake.script = [("text", "half"), ("error", "The model\nis out.")]
    ran = contextd("send", "c", "hi")
    assert (ran.code, ran.out) == (1, b"half")
    assert ran.err == "contextd: the turn has failed: The model is out. (model_error)\n"


def test_a_turn_that_someone_cancels_is_exit_code_1(fake: Served, command: Command) -> None:
    """The same for a cancel from elsewhere."""
    context = fake.contexts["c"]
    fake.script, fake.rate_s = [("text", "half"), *[("wait", "")] * 1000], 0.05
    process = subprocess.Popen(
        [*command[0], "send", "c", "hi"],
        env=command[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    fake.wait(lambda: any(id_ != "user" and held == 0 for id_, held in fake.pulls))
    fake.wait(lambda: len(fake.pulls) > 1)
    fake.do(lambda: fake.cancel(context, None))
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (1, b"half")
    assert err == b"contextd: the turn was cancelled\n"


def test_create_makes_a_context_only_if_there_is_none(fake: Served, contextd: Contextd) -> None:
    """Without --create an unknown context is an error; with it a known one is kept."""
    ran = contextd("send", "new", "hi")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err == "contextd: There is no such context here. (context_not_found)\n"
    assert contextd("send", "--create", "new", "hi").out == b"You said: hi"
    assert contextd("send", "--create", "new", "again").out == b"You said: again"
    assert [path for method, path in fake.requests if method == "POST"].count("/contexts") == 1


def test_no_wait_only_names_the_turn(fake: Served, contextd: Contextd) -> None:
    """No stream is opened."""
    ran = contextd("send", "c", "hi", "--no-wait")
    assert ran.out.decode().strip() in fake.contexts["c"].turns
    answer = json.loads(contextd("send", "c", "hi", "--no-wait", "--json").out)
    assert answer["turn_id"] in fake.contexts["c"].turns
    assert fake.streams == []


def test_json_is_an_event_a_line_and_the_turn_at_last(fake: Served, contextd: Contextd) -> None:
    """The lines' texts, joined, are the answer."""
    fake.script = [("thinking", "hm"), ("text", "a\x1b"), ("text", "b")]
    lines = [json.loads(line) for line in contextd("send", "c", "hi", "--json").out.splitlines()]
    texts = [line for line in lines if line["type"] == "text" and line["role"] == "assistant"]
    assert "".join(line["content"] for line in texts if line["kind"] == "text") == "a\x1bb"
    assert {line["type"] for line in lines[:-1]} == {"text", "closed"}
    assert (lines[-1]["type"], lines[-1]["turn"]["status"]) == ("turn", "completed")


def test_a_dash_reads_standard_input_as_it_is(fake: Served, command: Command) -> None:
    """No line feed is added, removed or translated; what is not UTF-8 is bad usage."""
    sent = [*command[0], "send", "c", "-", "--no-wait"]
    given = "é\r\n\n".encode()
    subprocess.run(sent, env=command[1], input=given, check=True, stdout=subprocess.DEVNULL)
    assert [body["payload"]["content"] for body in fake.sends.values()] == ["é\r\n\n"]
    ran = subprocess.run(sent, env=command[1], input=b"\xff", capture_output=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr == b"contextd: TEXT is not valid UTF-8. (see contextd send --help)\n"


def test_ctrl_c_cancels_the_turn(fake: Served, command: Command) -> None:
    """The server is asked, the last words are awaited, and the exit code is 130."""
    fake.script, fake.rate_s = [("text", "half"), *[("wait", "")] * 1000], 0.05
    process = subprocess.Popen(
        [*command[0], "send", "c", "hi", "--json"],
        env=command[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    while b"half" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err == b"contextd: interrupted; the turn is cancelled\n"
    assert [turn.status for turn in fake.contexts["c"].turns.values()] == ["cancelled"]
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"


def test_a_screen_is_not_driven_by_the_text(fake: Served, on_screen: Callable[..., Screen]) -> None:
    """Control characters are shown as symbols; thoughts are dimmed; the text ends with its line."""
    fake.script = [("thinking", "hm\x1b]0;x\x07"), ("text", "a\x1b[2Jb\x9b"), ("text", "\tc\x7f")]
    seen = on_screen("send", "c", "hi").read_to_end()
    assert "\x1b[2mhm␛]0;x␇\x1b[0m\r\n" in seen
    assert seen.endswith("a␛[2Jb\ufffd\tc␡\r\n")


def test_a_screen_shows_the_text_as_it_grows(
    fake: Served, on_screen: Callable[..., Screen]
) -> None:
    """The first words are there while the turn runs; a broken attempt is said to be one."""
    fake.script = [("text", "first"), *[("wait", "")] * 1000]
    fake.rate_s = 0.02
    screen = on_screen("send", "c", "hi")
    screen.read_until(b"first")
    context = fake.contexts["c"]
    assert [turn.status for turn in context.turns.values()] == ["running"]
    fake.do(lambda: fake.close(context, next(reversed(context.messages)), "interrupted"))
    screen.read_until(b"another attempt")
    fake.do(lambda: fake.cancel(context, None))
    assert "the turn was cancelled" in screen.read_to_end()
    assert screen.process.returncode == 1
