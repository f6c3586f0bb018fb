"""What of a conversation a model is shown when not all of it fits: its newest turns, whole."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import msgspec


class Counted(Protocol):
    """A message whose tokens were counted, with what the chat format puts around it."""

    @property
    def tokens(self) -> int: ...


M = TypeVar("M", bound=Counted)


class Trimmed(msgspec.Struct, Generic[M], frozen=True, kw_only=True):
    """`kept` turns in their order, their `tokens` together, and how much was left out before them."""

    kept: list[Sequence[M]]
    left_out_turns: int
    left_out_messages: int
    tokens: int


def trim(turns: Sequence[Sequence[M]], budget_tokens: int, reserved: int = 0) -> Trimmed[M]:
    """The newest of `turns`, oldest first, that fit into `budget_tokens` less `reserved`.

    A turn is kept whole or left out whole, so a tool's result never comes without its call. What is
    kept has no gap: the first turn from the end that does not fit ends it. The newest turn is kept
    also where it does not fit by itself; `tokens` then says so. `reserved` is for the system prompt,
    the tools and the answer.
    """
    room = budget_tokens - reserved
    first, tokens = len(turns), 0
    while first > 0:
        more = sum(message.tokens for message in turns[first - 1])
        if tokens + more > room and first < len(turns):
            break
        first, tokens = first - 1, tokens + more
    return Trimmed(
        kept=list(turns[first:]),
        left_out_turns=first,
        left_out_messages=sum(map(len, turns[:first])),
        tokens=tokens,
    )
