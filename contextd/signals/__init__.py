"""Signals: how far things have got, told to whoever watches, and never any text (§4)."""

from contextd.signals.backlog import Change, Stats
from contextd.signals.frames import Closing, Head, Level, Standing, cursor, parse_cursor
from contextd.signals.hub import Hub, Watch
from contextd.signals.reader import Reader

__all__ = [
    "Change",
    "Closing",
    "Head",
    "Hub",
    "Level",
    "Reader",
    "Standing",
    "Stats",
    "Watch",
    "cursor",
    "parse_cursor",
]
