"""docs/machine.md, made from the table that runs: `python tests/docs/machine_page.py > docs/machine.md`."""

from itertools import groupby

from contextd.core import machine
from contextd.core.machine import REST_STATES, TRANSITIONS, TURN_STATES, State

INTRODUCTION = """\
# The state machine

This page is generated from the table in `contextd/core/machine.py`, which is the one that runs. Do
not edit it. To write it again:

    .venv/bin/python tests/docs/machine_page.py > docs/machine.md

`GET /machine` answers the same table as JSON, and with `Accept: text/vnd.mermaid` the same diagram.
What the states and triggers mean is in [protocol.md](protocol.md#5-the-state-machine).
"""


def page() -> str:
    """The whole page, with a newline at its end."""
    parts = (
        INTRODUCTION,
        _diagram(),
        "## States\n\n" + _table(("state", "kind"), [(_code(s), _kind(s)) for s in State]),
        "## Transitions\n\n" + _table(("trigger", "from", "to"), _rows()),
    )
    return "\n".join(parts)


def _diagram() -> str:
    """GitHub draws a `mermaid` block; the library indents blank lines, which an editor would not keep."""
    lines = (line.rstrip() for line in machine.mermaid().splitlines())
    return "## Diagram\n\n```mermaid\n" + "\n".join(lines) + "\n```\n"


def _rows() -> list[tuple[str, ...]]:
    """One row for each trigger and target."""
    return [
        (_code(trigger), ", ".join(_code(row.from_state) for row in rows), target)
        for (trigger, target), group in groupby(TRANSITIONS, key=lambda r: (r.trigger, _target(r)))
        for rows in [list(group)]
    ]


def _target(row: machine.Transition) -> str:
    return "the same" if row.from_state == row.to_state else _code(row.to_state)


def _kind(state: State) -> str:
    if state in REST_STATES:
        return "at rest"
    return "of a turn" if state in TURN_STATES else "of a producer"


def _code(name: str) -> str:
    return f"`{name}`"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
