"""The proxy between producers and the server: it cuts requests more often than answers."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from random import Random

from cutting_proxy import CuttingProxy, Plan, make_plan

HEAD_MARKS = (b"PUT /", b"POST /", b"Host: ", b"Content-Length: ", b"\r\n\r\n")
BODY_MARKS = (
    b'"epoch":',
    b'"sequence":',
    b'"content":',
    b"}\n{",
    b'{"complete":',
    b"\\u",
    b"0\r\n\r\n",
)
CHARACTERS = tuple(map(str.encode, ("🙂", "👩‍👩‍👧‍👦", "🧵", "\u2028", "⟦", "日本語")))
ANSWER_MARKS = (
    b"HTTP/1.1 200",
    b"HTTP/1.1 409",
    b"\r\n\r\n",
    b"content-length: ",
    b'"sequence":',
    b'"accepted":',
    b'"epoch":',
)
REQUEST_SHARE = 0.6

_planned: ContextVar[Plan] = ContextVar("planned")


class ProducerProxy(CuttingProxy):
    """Cuts `cut_share` of the connections, and names what was cut more finely."""

    def __init__(self, target: Callable[[], int | None], *, seed: str, cut_share: float) -> None:
        super().__init__(target, seed=seed, cut_share=cut_share)

    def plan_next(self) -> Plan:
        """Of the connection that was accepted last."""
        plan = super().plan_next()
        random = Random(f"{self._seed}:producer:{self.connections}")
        upward = random.random() < REQUEST_SHARE
        marks = random.choice((HEAD_MARKS, BODY_MARKS, CHARACTERS, CHARACTERS))
        mark = random.choice(marks if upward else ANSWER_MARKS)
        inside = upward and marks is CHARACTERS
        plan = replace(
            make_plan(random, float(plan.cut), (mark,)),
            upward=upward,
            mark=mark if random.random() < 0.7 else None,
            mark_count=random.choice((1, 1, 2, 3, 6)),
            mark_offset=random.randint(int(inside), len(mark) - int(inside)),
            after_bytes=random.randrange(random.choice((40, 300, 1500, 6000, 40_000))),
        )
        _planned.set(plan)  # the tasks of this connection inherit it
        return plan

    def count(self, kind: str) -> None:
        """One more cut."""
        where, _, how = kind.partition("/")
        super().count(f"{_name(_planned.get(), where)}/{how}")


def _name(plan: Plan, where: str) -> str:
    if not plan.upward:
        return "answer's head" if where == "head" else "answer's body"
    if plan.mark in HEAD_MARKS:
        return "request's head"
    if plan.mark in CHARACTERS:
        return "request, in a character"
    return "request's body" if plan.mark else "request, anywhere"
