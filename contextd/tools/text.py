"""Text that a tool gave, made fit to be stored and to be read by a model. No I/O."""

from contextd.core.text import storable


def clip(text: str, bytes_max: int, note: str) -> str:
    """`text`, storable, in at most `bytes_max` bytes of UTF-8; one that was cut ends with `note`."""
    head = storable(
        text[: bytes_max + 1]
    )  # a character is a byte at least, so more is never needed
    encoded = head.encode()
    if len(encoded) <= bytes_max:
        return head
    ending = f"\n{note}".encode()
    kept = encoded[: max(0, bytes_max - len(ending))].decode(errors="ignore").encode()
    return (kept + ending)[:bytes_max].decode(errors="ignore")


def one_line(text: str, chars_max: int) -> str:
    """`text`, storable, on one line and in at most `chars_max` characters."""
    line = " ".join(storable(text[: chars_max + 1]).split())
    return line if len(line) <= chars_max else f"{line[: chars_max - 1]}…"
