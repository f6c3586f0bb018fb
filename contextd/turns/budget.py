"""What of a conversation fits into the model's budget of tokens (§6): whole turns, the newest first."""

import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from contextd.core.turn import LeftOut
from contextd.provider import ToolOffer
from contextd.store.history import Told
from contextd.tokens import FRAME_TOKENS, count_tokens, vocabulary_of
from contextd.trimming import trim

COUNTS_MAX = 65_536
LEARNED_S = 600.0  # how long it is remembered what a model takes
LEARNED_MAX = 256  # models


class _Counted(msgspec.Struct, frozen=True):
    told: Told
    tokens: int


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of a conversation, oldest first, and what is not."""

    told: list[Told]
    left_out: LeftOut | None


class Budget:
    """The tokens of each request: `tokens_max`, 0 for no limit, or what a model was found to take.

    What a message counts is kept in memory: its text never changes. `clock` is in seconds.
    """

    def __init__(self, tokens_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens_max = tokens_max
        self._clock = clock
        self._counts: dict[tuple[int, str | None], int] = {}
        self._learned: dict[str | None, tuple[int, float]] = {}
        self._lock = threading.Lock()  # several turns count at once, in threads

    def tokens_max(self, model: str | None) -> int:
        """What a request to `model` may have; 0 is no limit."""
        learned, until = self._learned.get(model, (0, 0.0))
        known = [self._tokens_max, learned if self._clock() < until else 0]
        return min(filter(None, known), default=0)

    def learn(self, model: str | None, *, sent_tokens: int, told_max: int | None) -> None:
        """Its server has refused `sent_tokens` as too many, and said that it takes `told_max`.

        Tokens are counted otherwise there, so some room is left. The server may be another one soon, so
        this is forgotten again.
        """
        fitting = sent_tokens // 2 if told_max is None else min(told_max, sent_tokens) * 3 // 4
        self._learned[model] = max(1, fitting), self._clock() + LEARNED_S
        if len(self._learned) > LEARNED_MAX:
            del self._learned[next(iter(self._learned))]

    def fit(
        self,
        told: Sequence[Told],
        *,
        model: str | None,
        system_prompt: str | None,
        offers: Sequence[ToolOffer],
    ) -> Fitted:
        """What is shown of `told`. May take a while: run it in a thread."""
        turns = [[_Counted(one, self._tokens(one, model)) for one in turn] for turn in _turns(told)]
        trimmed = trim(turns, self.tokens_max(model), _reserved(model, system_prompt, offers))
        kept = [counted.told for turn in trimmed.kept for counted in turn]
        if trimmed.left_out_messages == 0:
            return Fitted(told=kept, left_out=None)
        all_tokens = sum(counted.tokens for turn in turns for counted in turn)
        left_out = LeftOut(
            turns=trimmed.left_out_turns,
            messages=trimmed.left_out_messages,
            tokens=all_tokens - trimmed.tokens,
        )
        return Fitted(told=kept, left_out=left_out)

    def count(
        self,
        told: Sequence[Told],
        *,
        model: str | None,
        system_prompt: str | None,
        offers: Sequence[ToolOffer],
    ) -> int:
        """The tokens of a request that shows all of `told`. May take a while, as `fit` may."""
        reserved = _reserved(model, system_prompt, offers)
        return reserved + sum(self._tokens(one, model) for one in told)

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


def _reserved(model: str | None, system_prompt: str | None, offers: Sequence[ToolOffer]) -> int:
    """The tokens of what goes with every conversation."""
    tokens = _tokens(system_prompt, model) if system_prompt else 0
    return tokens + (_tokens(msgspec.json.encode(offers).decode(), model) if offers else 0)


def _tokens(text: str, model: str | None) -> int:
    return count_tokens(text, model).tokens + FRAME_TOKENS
