"""The live tail by itself: what it believes, what it counts, what it lets go of."""

import pytest

from contextd.core.message import MessageStatus
from contextd.core.values import SEQUENCE_MAX
from contextd.store.tail import LiveMessage, Tail

COMPLETED = MessageStatus.COMPLETED


class Clock:
    """Seconds that the test moves."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tail(clock: Clock) -> Tail:
    return Tail(bytes_max=1 << 20, clock=clock)


def message(number: int = 1, context_id: str = "c", opened_revision: int = 2) -> LiveMessage:
    return LiveMessage(
        context_id=context_id,
        message_id=f"m{number}",
        message_key=number,
        role="assistant",
        kind="text",
        opened_revision=opened_revision,
    )


def held(tail: Tail, *texts: str, number: int = 1, context_id: str = "c") -> LiveMessage:
    """A message that is open, with these chunks."""
    live = message(number, context_id)
    tail.add(live)
    for text in texts:
        append(tail, live, text)
    return live


def append(tail: Tail, live: LiveMessage, *texts: str, head: int | None = None) -> None:
    end = live.ends[-1] if live.ends else live.base_bytes
    ends = []
    for text in texts:
        end += len(text.encode())
        ends.append(end)
    tail.extend(live, texts, ends, head=head or live.head + len(texts), start_bytes=0)


def pulled(tail: Tail, context_id: str = "c", message_id: str = "m1") -> str | None:
    live = tail.trusted(context_id, message_id)
    found = None if live is None else live.read(0, SEQUENCE_MAX, 1 << 20)
    return None if found is None else found[1]


def test_a_close_at_another_head_drops_the_copy(tail: Tail) -> None:
    """What the tail says of a closed message is all of it, or nothing."""
    held(tail, "one ")
    tail.close("c", "m1", COMPLETED, final=3)
    assert tail.get("c", "m1") is None
    held(tail, "one ", number=2)
    tail.close("c", "m2", COMPLETED, final=1)
    live = tail.trusted("c", "m2")
    assert live is not None
    assert (live.status, live.head) == (COMPLETED, 1)
    assert [open_.message_id for open_ in tail.streaming()] == []


def test_a_copy_is_believed_for_a_second_after_it_was_known_to_be_right(
    tail: Tail, clock: Clock
) -> None:
    """From the moment at which the commit was asked for, or a read that agrees was begun."""
    live = held(tail, "one ")
    clock.s += 1.0
    assert pulled(tail) == "one "
    clock.s += 0.1
    assert pulled(tail) is None
    tail.learn("c", "m1", head=1, is_open=True, seen_s=clock.s)
    assert pulled(tail) == "one "
    asked_s = clock.s
    clock.s += 5.0  # the commit's answer took so long
    tail.extend(live, ["two "], [8], head=2, start_bytes=4, seen_s=asked_s)
    assert pulled(tail) is None


def test_a_closed_message_is_believed_while_its_context_is_known_to_exist(
    tail: Tail, clock: Clock
) -> None:
    """Of another message of the context, too: only with the context it may go."""
    held(tail, "one ")
    tail.close("c", "m1", COMPLETED, final=1)
    clock.s += 2.0
    assert pulled(tail) is None
    tail.learn("c", "elsewhere", head=9, is_open=True, seen_s=clock.s)
    assert pulled(tail) == "one "


def test_a_copy_behind_the_database_says_nothing_until_it_has_caught_up(tail: Tail) -> None:
    """A read may overtake the hook of this process's own commit: nothing is lost then."""
    live = held(tail, "one ")
    tail.learn("c", "m1", head=2, is_open=True, seen_s=100.0)
    assert pulled(tail) is None
    append(tail, live, "two ")
    assert pulled(tail) == "one two "
    tail.learn("c", "m1", head=1, is_open=True, seen_s=100.0)  # an older read
    assert pulled(tail) == "one two "


def test_what_was_seen_closed_is_not_told_as_open(tail: Tail) -> None:
    """By its own row, or because it is not among the open messages of its context."""
    live = held(tail, "one ")
    tail.learn("c", "m1", head=1, is_open=False, seen_s=100.0)
    assert pulled(tail) is None
    append(tail, live, "two ")  # a hook that comes late
    assert pulled(tail) is None
    held(tail, "one ", number=2)
    tail.learn_open("c", revision=2, heads={}, seen_s=100.0)
    assert pulled(tail, message_id="m2") is None


def test_a_read_from_before_a_message_was_opened_says_nothing_of_it(tail: Tail) -> None:
    """Its revision tells."""
    held(tail, "one ")
    tail.learn_open("c", revision=1, heads={}, seen_s=100.0)
    assert pulled(tail) == "one "


def test_chunks_after_a_hole_are_held_without_what_was_before_it(tail: Tail) -> None:
    """Another process wrote in between."""
    live = held(tail, "one ")
    append(tail, live, "four", head=4)
    assert pulled(tail) is None
    assert live.read(3, SEQUENCE_MAX, 100) == (4, "four")


def test_a_dropped_handle_keeps_its_head_and_no_text(tail: Tail) -> None:
    """What comes next is held again, from there on."""
    live = held(tail, "one ", "two ")
    tail.drop(live)
    assert (live.head, tuple(live.texts)) == (2, ())
    append(tail, live, "three")
    assert live.read(2, SEQUENCE_MAX, 100) == (3, "three")
    assert pulled(tail) is None


@pytest.mark.parametrize("forget", ["drop", "drop_streaming", "drop_context", "clear"])
def test_what_is_forgotten_weighs_nothing(tail: Tail, forget: str) -> None:
    """Whichever way it goes."""
    live = held(tail, "one ", "zwölf ")
    getattr(tail, forget)(*{"drop": [live], "clear": []}.get(forget, ["c"]))
    assert (tail.weight_bytes, len(tail), tail.streaming()) == (0, 0, [])
    assert not live.texts


def test_a_context_goes_with_its_closed_messages_and_no_other(tail: Tail) -> None:
    """By an index: what it costs does not depend on what else is held."""
    for number in range(5):
        held(tail, "x", number=number)
        tail.close("c", f"m{number}", COMPLETED, final=1)
    held(tail, "y", number=9, context_id="d")
    before = tail.weight_bytes
    tail.drop_context("c")
    assert (len(tail), 0 < tail.weight_bytes < before / 3) == (1, True)
    assert pulled(tail, "d", "m9") == "y"


@pytest.mark.parametrize("texts", [[], ["hi"], ["a", "b", "c"]])
@pytest.mark.parametrize("per_context", [1, 20, 100_000])
def test_empty_and_short_messages_are_counted(texts: list[str], per_context: int) -> None:
    """No number of them makes the tail larger than its bound: each costs some hundred bytes."""
    bytes_max = 1 << 18
    tail = Tail(bytes_max=bytes_max)
    for number in range(2000):
        live = held(tail, *texts, number=number, context_id=f"c{number // per_context}")
        tail.close(live.context_id, live.message_id, COMPLETED, final=len(texts))
    assert tail.weight_bytes <= bytes_max
    assert 100 < len(tail) < bytes_max / 350
    assert tail.streaming() == []
    assert tail.get(live.context_id, live.message_id) is live  # the newest stays


def test_a_text_that_is_not_ascii_weighs_what_python_makes_of_it() -> None:
    """One character beyond U+FFFF makes all others four times as large."""
    plain, wide = Tail(bytes_max=1 << 20), Tail(bytes_max=1 << 20)
    held(plain, "a" * 1000)
    held(wide, "a" * 999 + "😀")
    assert wide.weight_bytes > plain.weight_bytes + 3000


def test_the_context_that_was_written_last_stays() -> None:
    """Others go first, with their oldest messages first."""
    tail = Tail(bytes_max=20_000)
    first = held(tail, "x", context_id="first")
    for number in range(2, 100):
        held(tail, "x" * 100, number=number, context_id=f"c{number}")
        append(tail, first, "y")
    assert tail.get("first", "m1") is first
    assert tail.get("c2", "m2") is None


def test_no_text_is_in_a_repr(tail: Tail) -> None:
    """A log may have it."""
    assert "secret" not in repr(held(tail, "secret"))
