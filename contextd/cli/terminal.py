"""What goes to the screen or into a pipe.

A model's text must not drive the terminal, and must not change on its way into a file: on a terminal
control characters are shown as symbols, in a pipe every byte is the text's own, in UTF-8.
"""

import asyncio
import io
import sys
from collections.abc import Coroutine
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

INTERRUPTED = 130  # the exit code that shells know for Ctrl-C

_SYMBOLS = {
    **{code: 0x2400 + code for code in range(32) if code not in {9, 10}},  # but tab and line feed
    127: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    # What turns the direction of what follows: it could show a call as another one.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def visible(text: str) -> str:
    """`text` with control characters but tab and line feed as symbols: ESC is `␛`.

    So are those that change the direction of writing.
    """
    return text.translate(_SYMBOLS)


def tolerate_any_encoding() -> None:
    """What the terminal's encoding lacks is shown as `?`, rather than ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def complain(message: str) -> None:
    """One line on standard error."""
    print(f"contextd: {visible(' '.join(message.split()))}", file=sys.stderr)  # noqa: T201


def run(main: Coroutine[Any, Any, int | None]) -> int:
    """Runs a command. If the reader of its output goes away (`| head`), click ends it quietly."""
    code = asyncio.run(main)
    sys.stdout.flush()
    return code or 0


class Terminal:
    """Standard output, be it a screen (`is_tty`) or a pipe."""

    def __init__(self) -> None:
        self.is_tty = sys.stdout.isatty()
        # A pipe has no width: a table's row stays one line there.
        self.console = Console(
            width=None if self.is_tty else 10_000, markup=False, highlight=False, emoji=False
        )

    def write(self, text: str) -> None:
        """Exactly `text` into a pipe, `visible` text on a screen; at once."""
        if self.is_tty:
            sys.stdout.write(visible(text))
        else:
            sys.stdout.buffer.write(text.encode())
        sys.stdout.flush()

    def dim(self, text: str) -> None:
        """The same, less prominent where that is possible."""
        if self.is_tty:
            self.console.print(Text(visible(text), style="dim"), end="", soft_wrap=True)
        else:
            self.write(text)

    def line(self, value: Any) -> None:
        """`value` as one line of JSON."""
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.flush()


class Transcript:
    """Texts of several messages that grow at the same time, one below the other.

    Where another message goes on, a new line is begun, and a header if there is one to be shown.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._message_id: str | None = None
        self._inside_line = False

    def text(self, message_id: str, kind: str, content: str, *, header: str = "") -> None:
        """More of a message's text; `header` says whose it is."""
        if message_id != self._message_id:
            self.end_line()
            self._message_id = message_id
            if header:
                self._terminal.dim(f"── {header}\n")
        write = self._terminal.write if kind == "text" else self._terminal.dim
        write(content)
        self._inside_line = not content.endswith("\n") if content else self._inside_line

    def note(self, line: str) -> None:
        """A line that is nobody's text."""
        self.end_line()
        self._terminal.dim(f"· {line}\n")
        self._message_id = None

    def end_line(self) -> None:
        """Ends the line that a text has begun, if it has."""
        if self._inside_line:
            self._terminal.write("\n")
        self._inside_line = False
