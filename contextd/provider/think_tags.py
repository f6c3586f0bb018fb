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
        text, self._held = self._held, ""
        if text:
            yield ("text" if self._close is None else "thinking"), text

    def _read_opening(self) -> None:
        text = self._held.lstrip()
        for opening, close in _CLOSE_BY_OPEN.items():
            if text.startswith(opening):
                self._held, self._close, self._fresh = text[len(opening) :], close, True
                return
        if any(opening.startswith(text) for opening in _CLOSE_BY_OPEN):
            return
        self._over = True
        if self._thought:
            self._held = text  # the white space between the reasoning and the answer is neither's

    def _read_reasoning(self, close: str) -> Iterator[Part]:
        if self._fresh:
            self._held = self._held.lstrip("\n")
            self._fresh = not self._held
        thinking, found, after = self._held.partition(close)
        if found:
            self._held, self._close, self._thought = after, None, True
            thinking = thinking.rstrip("\n")
        else:
            kept = _beginning_of(close, thinking)
            thinking, self._held = (
                thinking[: len(thinking) - kept],
                thinking[len(thinking) - kept :],
            )
        if thinking:
            yield "thinking", thinking


def _beginning_of(tag: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`, or line breaks before it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length + _line_breaks(text[:-length])
    return _line_breaks(text)


def _line_breaks(text: str) -> int:
    return len(text) - len(text.rstrip("\n"))
