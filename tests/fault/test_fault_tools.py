"""The tools of the fault suite accuse when they should: a suite that cannot fail proves nothing."""

import asyncio
from collections.abc import Callable
from random import Random

import pytest
from cutting_proxy import BODY_MARKS, CuttingProxy, Fuse, Plan, make_plan
from evidence import Evidence
from nasty_scripts import Reply, Script, nasty_script
from raw_http import BrokenError, Connection, EventStream, GarbledError

Lie = Callable[[Evidence], None]

LIES: dict[str, Lie] = {
    "different text": lambda e: e.pulled("c", "m", 0, 2, "aX", "r"),
    "a boundary elsewhere": lambda e: e.pulled("c", "m", 0, 3, "ab", "r"),
    "text without a position": lambda e: e.pulled("c", "m", 3, 3, "d", "r"),
    "a position without text": lambda e: e.pulled("c", "m", 3, 4, "", "r"),
    "beyond the end": lambda e: e.reached("c", "closed", 8, "r"),
    "an end below what was told": lambda e: e.closed("c", "m", "completed", 2, "r"),
    "another status": lambda e: e.closed("c", "closed", "failed", 7, "r"),
    "another end": lambda e: e.closed("c", "closed", "completed", 9, "r"),
    "another state": lambda e: e.standing("c", 5, "failed", "r"),
    "another kind": lambda e: e.described("c", "m", "assistant", "thinking", "r"),
}


def _evidence() -> Evidence:
    evidence = Evidence("seed 7")
    evidence.pulled("c", "m", 0, 2, "ab", "a reader")
    evidence.pulled("c", "m", 2, 3, "c", "a reader")
    evidence.pulled("c", "m", 0, 3, "abc", "another")
    evidence.closed("c", "closed", "completed", 7, "a reader")
    evidence.standing("c", 5, "idle", "a reader")
    evidence.described("c", "m", "assistant", "text", "a reader")
    return evidence


def test_truth_is_no_fault() -> None:
    """What fits together is not accused."""
    _evidence().require_none()


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_is_a_fault_that_names_the_seed(lie: Lie) -> None:
    """Each contradiction is noticed, and says how to run it again."""
    evidence = _evidence()
    lie(evidence)
    with pytest.raises(AssertionError, match="seed 7"):
        evidence.require_none()


def test_a_script_explains_only_its_own_beginnings() -> None:
    """What an attempt had written when it broke is a cut between two chunks, and nothing else."""
    script = Script("", (Reply("thinking", ("a", "b")), Reply("text", ("c", "d"))))
    assert script.explains([])
    assert script.explains([Reply("thinking", ("a",))])
    assert script.explains([Reply("thinking", ("a", "b")), Reply("text", ("c",))])
    assert not script.explains([Reply("text", ("c",))])
    assert not script.explains([Reply("thinking", ("a",)), Reply("text", ("c",))])
    assert not script.explains([Reply("thinking", ("ab",))])


def test_a_seed_gives_the_same_plans_and_scripts() -> None:
    """A failed run can be looked at again."""
    first, second = Random("x"), Random("x")
    assert make_plan(first, 0.5, BODY_MARKS) == make_plan(second, 0.5, BODY_MARKS)
    assert nasty_script(first, seconds_max=1) == nasty_script(second, seconds_max=1)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_fuse_burns_at_its_mark_however_the_bytes_come(size: int) -> None:
    """A mark is found across the seams of reads, and the cut falls on the byte that was meant."""
    data = b"one\n\ntwo\n\nthree"
    plan = _plan(mark=b"\n\n", mark_count=2, mark_offset=1)
    fuse, passed = Fuse(plan), b""
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        place = fuse.burn(piece)
        passed += piece[:place]
        if place is not None:
            break
    assert passed[:9] == b"one\n\ntwo\n"
    assert len(passed) <= 10  # a mark that is told by its last byte can be cut only behind it


@pytest.mark.parametrize("how", ["reset", "close", "half_down", "half_up"])
async def test_a_cut_answer_is_broken_and_never_short(how: str) -> None:
    """A client of the suite cannot mistake a cut for an end."""
    async with _Serving(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789") as port:
        proxy = _CutOnce(lambda: port, plan=_plan(after_bytes=45, how=how))
        await proxy.start()
        with pytest.raises(BrokenError):
            await Connection(proxy.port).request("GET", "/")
        assert proxy.cut_count == 1
        answer = await Connection(proxy.port).request("GET", "/")
        assert answer.body == b"0123456789"
        await proxy.close()


async def test_pieces_change_nothing() -> None:
    """What is delivered a byte at a time is what was sent."""
    body = "🙂\u2028".encode() * 20
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with _Serving(head + body) as port:
        proxy = _CutOnce(lambda: port, plan=_plan(cut=False, piece_bytes=1))
        await proxy.start()
        assert (await Connection(proxy.port).request("GET", "/")).body == body
        await proxy.close()


async def test_a_stream_without_its_end_is_broken() -> None:
    """A stream has ended cleanly only with its last chunk; half a block is dropped or accused."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = head + b"9\r\ndata: a\n\n\r\n"
    async with _Serving(whole) as port:
        stream = await EventStream.open(port, "/")
        heard: list[str] = []
        with pytest.raises(BrokenError):
            await _drain(stream, heard)
        assert heard == ["a"]
        assert not stream.ended_cleanly
    async with _Serving(whole + b"7\r\ndata: b\r\n0\r\n\r\n") as port:
        stream = await EventStream.open(port, "/")
        with pytest.raises(GarbledError):
            await _drain(stream, [])


async def _drain(stream: EventStream, heard: list[str]) -> None:
    async for event in stream.events(5):
        heard.append(event.data)  # noqa: PERF401 - what came before an error counts


def _plan(
    *,
    cut: bool = True,
    after_bytes: int = 0,
    mark: bytes | None = None,
    mark_count: int = 1,
    mark_offset: int = 0,
    how: str = "close",
    piece_bytes: int = 0,
) -> Plan:
    return Plan(
        cut=cut,
        upward=False,
        after_bytes=after_bytes,
        mark=mark,
        mark_count=mark_count,
        mark_offset=mark_offset,
        stall_s=0.0,
        how=how,
        half_s=0.01,
        piece_bytes=piece_bytes,
    )


class _CutOnce(CuttingProxy):
    """The first connection has the plan that is given; the others are left alone."""

    def __init__(self, target: Callable[[], int | None], *, plan: Plan) -> None:
        super().__init__(target, seed="", cut_share=0.0)
        self._plan = plan

    def plan_next(self) -> Plan:
        """Of the connection that was accepted last."""
        return self._plan if self.connections == 1 else super().plan_next()


class _Serving:
    """A server that answers every connection with the same bytes, and closes it."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        writer.close()
