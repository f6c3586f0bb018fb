"""What of a conversation fits into the model's budget of tokens (§6): whole turns, the newest first."""

from collections.abc import Sequence
from itertools import groupby

import msgspec

from contextd.core.turn import LeftOut
from contextd.tokens import FRAME_TOKENS, count_tokens
from contextd.trimming import trim
from contextd.turns.history import Said


class _Counted(msgspec.Struct, frozen=True):
    said: Said
    tokens: int


def fit(
    said: Sequence[Said], *, budget_tokens: int, model: str | None, system_prompt: str | None
) -> tuple[list[Said], LeftOut | None]:
    """What is shown of `said`, oldest first, and what is not. May take a while: run it in a thread."""
    turns = [
        [_Counted(one, _tokens(one.text, model)) for one in group]
        for _, group in groupby(said, key=lambda one: one.row.turn_id or one.row.key)
    ]
    reserved = _tokens(system_prompt, model) if system_prompt else 0
    trimmed = trim(turns, budget_tokens, reserved)
    kept = [counted.said for turn in trimmed.kept for counted in turn]
    if trimmed.left_out_messages == 0:
        return kept, None
    left_out = LeftOut(turns=trimmed.left_out_turns, messages=trimmed.left_out_messages)
    return kept, left_out


def _tokens(text: str, model: str | None) -> int:
    return count_tokens(text, model).tokens + FRAME_TOKENS
