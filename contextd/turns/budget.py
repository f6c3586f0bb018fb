"""What of a conversation fits into the model's budget of tokens (§6): whole turns, the newest first."""

from collections.abc import Sequence

import msgspec

from contextd.core.turn import LeftOut
from contextd.store.history import Told
from contextd.tokens import FRAME_TOKENS, count_tokens
from contextd.trimming import trim


class _Counted(msgspec.Struct, frozen=True):
    told: Told
    tokens: int


def fit(
    told: Sequence[Told], *, budget_tokens: int, model: str | None, system_prompt: str | None
) -> tuple[list[Told], LeftOut | None]:
    """What is shown of `told`, oldest first, and what is not. May take a while: run it in a thread."""
    turns = [[_Counted(one, _tokens(one.text, model)) for one in turn] for turn in _turns(told)]
    reserved = _tokens(system_prompt, model) if system_prompt else 0
    trimmed = trim(turns, budget_tokens, reserved)
    kept = [counted.told for turn in trimmed.kept for counted in turn]
    if trimmed.left_out_messages == 0:
        return kept, None
    left_out = LeftOut(turns=trimmed.left_out_turns, messages=trimmed.left_out_messages)
    return kept, left_out


def _turns(told: Sequence[Told]) -> list[list[Told]]:
    """By turns, of which none is cut: what was stored in the midst of one goes with it."""
    last = {one.turn: index for index, one in enumerate(told) if one.turn is not None}
    turns: list[list[Told]] = []
    end = -1
    for index, one in enumerate(told):
        if index > end:
            turns.append([])
        turns[-1].append(one)
        end = max(end, index if one.turn is None else last[one.turn])
    return turns


def _tokens(text: str, model: str | None) -> int:
    return count_tokens(text, model).tokens + FRAME_TOKENS
