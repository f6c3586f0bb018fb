"""The agent loop: runs turns from where they stand to their ends."""

from contextd.turns.executing import Executing
from contextd.turns.runner import Turns

__all__ = ["Executing", "Turns"]
