"""What all commands share: exit codes, one-line errors, pipes and encodings."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from cli_parts import Ran, Screen, Served

from contextd import __version__
from contextd.cli import main
from contextd.cli.terminal import visible

Contextd = Callable[..., Ran]
Command = tuple[list[str], dict[str, str]]


def test_version_and_help(contextd: Contextd) -> None:
    """Help is what one gets without a command, and no error."""
    assert contextd("--version").out.decode() == f"contextd {__version__}\n"
    help_ = contextd().out.decode()
    for name in ("serve", "send", "tail", "ls", "show", "cancel", "demo"):
        assert name in help_
        assert contextd(name, "--help").code == 0
    assert contextd("-h").code == 0


@pytest.mark.parametrize(
    "arguments",
    [["brew"], ["send"], ["send", "c"], ["ls", "--colour"], ["show", "a", "b"], ["--x"]],
)
def test_bad_usage_is_one_line_and_exit_code_2(contextd: Contextd, arguments: list[str]) -> None:
    """And it says where to look."""
    ran = contextd(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, b"", 1)
    assert ran.err.startswith("contextd: ")
    assert "--help)" in ran.err


@pytest.mark.parametrize("arguments", [["ls"], ["send", "c", "hi"], ["tail", "c"], ["cancel", "c"]])
def test_a_server_that_is_not_there_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what to do about it."""
    assert main([*arguments, "--url", "http://127.0.0.1:1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("contextd: contextd is not reachable at http://127.0.0.1:1 (")
    assert err.endswith("); start it with `contextd serve`\n")


def test_a_refusal_is_its_detail_and_code(fake: Served, contextd: Contextd) -> None:
    """One line, even if the server's words have several."""
    ran = contextd("show", "nowhere")
    assert (ran.code, ran.out) == (1, b"")
    assert ran.err == "contextd: There is no such context here. (context_not_found)\n"


def test_a_reader_that_goes_away_ends_it_quietly(fake: Served, command: Command) -> None:
    """`contextd show … | head -c 1`: no traceback, whichever way the output is written."""
    fake.append(fake.add("c", title="x" * 70_000), "m", "y" * 200_000)
    for arguments in (["show", "c"], ["show", "c", "--json"], ["ls"], ["cancel", "c"]):
        reading, writing = os.pipe()
        os.close(reading)
        ran = subprocess.run(
            [*command[0], *arguments],
            env=command[1],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=10,
            check=False,
        )
        os.close(writing)
        assert (ran.returncode, ran.stderr) == (1, b"")


def test_a_terminal_without_unicode_is_served(
    fake: Served, on_screen: Callable[..., Screen]
) -> None:
    """What its encoding lacks is a question mark."""
    fake.append(fake.add("c", title="é🙂"), "m", "é🙂\x1b!")
    for arguments in (["show", "c"], ["ls"]):
        screen = on_screen(*arguments, PYTHONIOENCODING="ascii")
        seen = screen.read_to_end()
        assert screen.process.returncode == 0
        assert "??" in seen


def test_a_pipe_is_utf_8_whatever_the_locale_says(fake: Served, command: Command) -> None:
    """Text is not re-coded on its way into a file."""
    fake.add("c")
    ran = subprocess.run(
        [*command[0], "send", "c", "é🙂"],
        env=command[1] | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert ran.stdout.decode() == "You said: é🙂"


@pytest.mark.parametrize(
    "words", [("show", b"\xff"), ("decide", "c", "deny", "--call", "x", "--reason", b"\xff")]
)
def test_an_argument_that_is_no_text_is_bad_usage(
    command: Command, words: tuple[str | bytes, ...]
) -> None:
    """One line, whatever the argument is for."""
    sent = [*command[0], *words]
    ran = subprocess.run(sent, env=command[1], capture_output=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, b"")
    assert ran.stderr == b"contextd: an argument is not UTF-8\n"


def test_visible_leaves_text_and_replaces_what_drives_a_terminal() -> None:
    """Tab and line feed stay; every other control character becomes a symbol."""
    assert visible("é🙂\t\n") == "é🙂\t\n"
    assert visible("\x00\x07\r\x1b\x7f\x85\x9b") == "␀␇␍␛␡\ufffd\ufffd"
    assert visible("a\u202eb\u2066c\u200f") == "a\ufffdb\ufffdc\u200f"


def test_a_proxy_that_is_not_there_is_an_error_of_one_line(command: Command) -> None:
    """The environment's proxies count as with any HTTP client."""
    environment = command[1] | {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "contextd", "ls"], env=environment, capture_output=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (1, b"", 1)
