"""What of a conversation fits into the model's budget of tokens (§6): whole turns, the newest first."""

import threading
from collections.abc import Sequence

import msgspec

from contextd.core.turn import LeftOut
from contextd.provider import ToolOffer
from contextd.store.history import Told
from contextd.tokens import FRAME_TOKENS, count_tokens, vocabulary_of
from contextd.trimming import trim

COUNTS_MAX = 65_536


class _Counted(msgspec.Struct, frozen=True):
    told: Told
    tokens: int


class Budget:
    """`tokens_max` of each request. What a message counts is kept in memory: its text never changes."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._counts: dict[tuple[int, str | None], int] = {}
        self._lock = threading.Lock()  # several turns count at once, in threads

    def fit(
        self,
        told: Sequence[Told],
        *,
        model: str | None,
        system_prompt: str | None,
        offers: Sequence[ToolOffer],
    ) -> tuple[list[Told], LeftOut | None]:
        """What is shown of `told`, oldest first, and what is not. May take a while: run it in a thread."""
        turns = [[_Counted(one, self._tokens(one, model)) for one in turn] for turn in _turns(told)]
        reserved = _tokens(system_prompt, model) if system_prompt else 0
        if offers:
            reserved += _tokens(msgspec.json.encode(offers).decode(), model)
        trimmed = trim(turns, self._tokens_max, reserved)
        kept = [counted.told for turn in trimmed.kept for counted in turn]
        if trimmed.left_out_messages == 0:
            return kept, None
        all_tokens = sum(counted.tokens for turn in turns for counted in turn)
        left_out = LeftOut(
            turns=trimmed.left_out_turns,
            messages=trimmed.left_out_messages,
            tokens=all_tokens - trimmed.tokens,
        )
        return kept, left_out

    def _tokens(self, one: Told, model: str | None) -> int:
        key = one.row.key, vocabulary_of(model)
        found = self._counts.get(key)
        if found is None:
            found = _tokens(one.text, model)
            with self._lock:
                self._counts[key] = found
                if len(self._counts) > COUNTS_MAX:
                    del self._counts[next(iter(self._counts))]  # the one that was counted first
        return found


def _turns(told: Sequence[Told]) -> list[list[Told]]:
    """By turns, of which none is cut: what was stored in the midst of one goes with it.

    The running turn is the last, with all that was stored since it began.
    """
    last = {one.turn: len(told) if one.running else index for index, one in enumerate(told)}
    turns: list[list[Told]] = []
    end = -1
    for index, one in enumerate(told):
        if index > end:
            turns.append([])
        turns[-1].append(one)
        end = max(end, last[one.turn])
    return turns


def _tokens(text: str, model: str | None) -> int:
    return count_tokens(text, model).tokens + FRAME_TOKENS
