"""Reasoning that a model wrote into its text, between tags, told apart from the answer.

A server that does not know its model's format sends both as one text. The tag is believed only where
nothing but white space, or reasoning, came before it: further on a model may be writing about tags.
"""

from collections.abc import Iterator
from typing import Literal, TypeAlias

_CLOSE_BY_OPEN = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",
}

Part: TypeAlias = tuple[Literal["text", "thinking"], str]


class ThinkTags:
    """Takes text in pieces, cut anywhere, and gives its parts without the tags."""

    def __init__(self) -> None:
        self._held = ""
        self._blank: list[str] = []  # white space before what is held, while no text has begun
        self._breaks = 0  # line breaks at the end of the reasoning, before what is held
        self._close: str | None = None  # what ends the reasoning that is being read
        self._fresh = False  # nothing of that reasoning has been said: line breaks before it go
        self._thought = False
        self._over = False  # the answer has begun: no tag counts any more

    def add(self, piece: str) -> Iterator[Part]:
        """What can be said now: all but the beginning of what may be a tag."""
        self._held += piece
        while not self._over and self._held:
            before = len(self._held), self._close
            if self._close is not None:
                yield from self._read_reasoning(self._close)
            else:
                self._read_opening()
            if (len(self._held), self._close) == before:
                break  # more has to come before anything can be said
        if self._over and self._held:
            text, self._held = self._held, ""
            yield "text", text

    def rest(self) -> Iterator[Part]:
        """What is left at the end: reasoning that was not ended, or what was no tag after all."""
        before = "".join(self._blank) if self._close is None else "\n" * self._breaks
        text, self._held, self._blank, self._breaks = before + self._held, "", [], 0
        if text:
            yield ("text" if self._close is None else "thinking"), text

    def _read_opening(self) -> None:
        text = self._held.lstrip()
        if not self._thought:  # the white space between the reasoning and the answer is neither's
            self._blank.append(self._held[: len(self._held) - len(text)])
        self._held = text
        for opening, close in _CLOSE_BY_OPEN.items():
            if text.startswith(opening):
                self._held, self._close, self._fresh = text[len(opening) :], close, True
                self._blank = []
                return
        if not any(opening.startswith(text) for opening in _CLOSE_BY_OPEN):
            self._held, self._blank, self._over = "".join([*self._blank, text]), [], True

    def _read_reasoning(self, close: str) -> Iterator[Part]:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
        thinking, found, after = self._held.partition(close)
        if found:
            self._held, self._close, self._thought = after, None, True
        else:
            kept = _beginning_of(close, thinking)
            thinking, self._held = (
                thinking[: len(thinking) - kept],
                thinking[len(thinking) - kept :],
            )
        said = thinking.rstrip("\n")
        breaks, self._breaks = self._breaks, len(thinking) - len(said)
        if said:
            yield "thinking", "\n" * breaks + said
        elif not found:
            self._breaks += breaks
        if found:
            self._breaks = 0  # line breaks before the end of the reasoning go


def _beginning_of(tag: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)
