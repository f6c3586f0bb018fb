"""§7 at the wire: producers that fall silent, servers that stop, and the other database."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from producing import Pen, lines, numbered
from serving import Server
from signal_rules import check_live, types
from wire import Api, Json, ok, problem, until

FAST = {"scripted_rate": 0}


# Silence


@pytest.fixture(scope="module")
def hasty(make_server: Callable[..., Server]) -> Iterator[Api]:
    """A server that takes half a second of silence for a producer's end, with one body at a time."""
    client = Api(make_server(producer_silence_s=0.5, line_bodies_max=1).url)
    yield client
    client.close()


def test_a_silent_producer_loses_its_message(hasty: Api) -> None:
    """Closed as interrupted at its head, signalled, listed; the queue goes on; writes are refused."""
    pen = Pen(hasty, hasty.create())
    with hasty.stream(pen.context_id, throttle_ms=0) as stream:
        frames = stream.current()
        pen.open()
        pen.write("a", "b")
        queued = hasty.send(pen.context_id, "queued")
        frames += stream.until_completed("out")
    check_live(frames)
    assert (frames[-1]["status"], frames[-1]["final_sequence"]) == ("interrupted", 2)
    message = pen.message()
    assert (message["status"], message["final_sequence"]) == ("interrupted", 2)
    assert message["stats"]["chunks"] == 2
    assert hasty.ended(pen.context_id, queued["turn_id"])["status"] == "completed"
    assert "out" in [m["id"] for m in hasty.messages(pen.context_id)]
    steps = [row["trigger"] for row in hasty.journal(pen.context_id)]
    assert steps[:3] == ["open_message", "close_message", "receive_message"]
    for response in (pen.post({"content": "c"}), pen.complete(), pen.fail(), pen.put()):
        refusal = problem(response, 409, "message_closed")
        assert (refusal["message_status"], refusal["final_sequence"]) == ("interrupted", 2)
    assert ok(pen.batch(*numbered(1, "a", "b"), epoch=1))["duplicates"] == 2


def test_a_silent_body_loses_its_message_too(hasty: Api) -> None:
    """An open connection is no sign of life: its next line is refused."""
    pen = Pen(hasty, hasty.create())
    pen.open()
    with pen.body() as body:
        body.line(content="a")
        until(lambda: pen.message()["status"] == "interrupted", "the interruption")
        body.try_piece(lines({"content": "b"}))
        refusal = problem(body.answer(), 409, "message_closed")
        assert refusal["message_status"] == "interrupted"
    assert pen.texts() == ["a"]


def test_a_silent_body_does_not_keep_its_place(hasty: Api) -> None:
    """When its message is lost, it counts no more among the bodies that may be open.

    Else producers whose machines are gone, with connections that nobody has closed, keep others out.
    """

    def write() -> httpx.Response:
        each = Pen(hasty, hasty.create())
        each.open()
        return each.lines(lines({"content": "b"}))

    until(lambda: write().status_code == 200, "the end of the body before")
    lost = Pen(hasty, hasty.create())
    lost.open()
    with lost.body() as body:
        body.line(content="a")
        lost.reached(1)
        response = write()
        problem(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        until(lambda: lost.message()["status"] == "interrupted", "the interruption")
        until(lambda: write().status_code == 200, "a free place")


def test_every_sign_of_life_counts(make_server: Callable[..., Server]) -> None:
    """Who writes, opens again or takes over keeps its message, while another's ends."""
    api = Api(make_server(producer_silence_s=1.5).url)
    first = Pen(api, api.create())
    names = ("silent", "writing", "opening", "taking", "lines")
    pens = {name: first.other(name) for name in names}
    for each in pens.values():
        each.open()

    def silent_is_over() -> bool:
        ok(pens["writing"].post({"content": "x"}))
        ok(pens["opening"].put())
        ok(pens["taking"].put(producer={"id": "worker-1"}))
        ok(pens["lines"].lines(lines({"content": "x"})))
        return bool(pens["silent"].message()["status"] == "interrupted")

    until(silent_is_over, "the interruption of the silent one")
    statuses = {name: each.message()["status"] for name, each in pens.items()}
    assert statuses == {name: "interrupted" if name == "silent" else "streaming" for name in names}
    api.close()


# Restarts


def test_a_restart_leaves_a_produced_message_open(tmp_path: Path) -> None:
    """After a crash in the middle of a body its producer goes on where GET says, in its epoch.

    The time in which no server ran is no silence. A stop does not wait for bodies that are open.
    """
    settings = {**FAST, "producer_silence_s": 2.5}
    server = Server(tmp_path / "contextd.db", settings=settings).start()
    pen = Pen(Api(server.url), Api(server.url).create())
    pen.open()
    queued = pen.api.send(pen.context_id, "queued")
    with pen.body() as body:
        body.piece(lines({"epoch": 1}, *numbered(1, "a", "b")) + b'{"sequence":3,')
        pen.reached(2)
        before = pen.message()
        server.kill()
    killed_at = time.monotonic()
    until(lambda: time.monotonic() > killed_at + 2.6, "the time of a silence")

    server = Server(tmp_path / "contextd.db", settings=settings).start()
    pen = Pen(Api(server.url), pen.context_id)
    assert ok(pen.put()) == before
    assert pen.api.context(pen.context_id)["state"] == "producing"
    assert pen.api.turn(pen.context_id, queued["turn_id"])["status"] == "queued"
    problem(pen.put(producer={"id": "other", "epoch": 1}), 409, "stale_producer")
    with pen.body() as body, pen.api.stream(pen.context_id) as stream:
        body.piece(lines({"epoch": 1}, *numbered(2, "b", "c")))
        stream.until(lambda f: f.get("current_sequence") == 3)
        assert server.stop() == 0

    with Server(tmp_path / "contextd.db", settings=settings) as server:
        pen = Pen(Api(server.url), pen.context_id)
        assert ok(pen.complete(epoch=1, final_sequence=3))["status"] == "completed"
        assert pen.texts() == ["a", "b", "c"]
        assert pen.api.ended(pen.context_id, queued["turn_id"])["status"] == "completed"


# On the other database


def test_a_produced_message_on_postgresql(postgresql_url: str) -> None:
    """The same answers, from opening to the end, with neighbours in one commit and large epochs."""
    with Server(postgresql_url, settings=FAST) as server:
        api = Api(server.url)
        pen = Pen(api, api.create())
        assert pen.open(producer={"id": "w", "epoch": 2**53 - 2})["epoch"] == 2**53 - 2
        ok(pen.put(producer={"id": "v"}))
        problem(pen.post({"content": "x", "epoch": 5}), 409, "stale_producer")

        def write(n: int) -> Json:
            chunk = {"content": f"{n} "} if n % 3 else {"content": "x", "sequence": 999}
            return dict(pen.batch(chunk).json())

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(write, range(60)))
        assert sum("accepted" in answer for answer in answers) == 40
        assert sum(answer.get("code") == "sequence_gap" for answer in answers) == 20
        texts = pen.texts()
        assert sorted(map(int, texts)) == [n for n in range(60) if n % 3]
        again = ok(pen.lines(lines(*numbered(1, *texts), *numbered(41, "ü\u2028"))))
        assert (again["accepted"], again["duplicates"]) == (1, 40)
        problem(pen.batch(*numbered(41, "u")), 409, "sequence_conflict")
        assert pen.post({"content": "\u0000"}).status_code == 400
        assert pen.fail(error={"type": "x", "message": "\u0000"}).status_code == 400
        assert pen.complete(finish_reason="\u0000").status_code == 400
        queued = api.send(pen.context_id, "queued")
        assert ok(pen.complete(final_sequence=41))["stats"]["chunks"] == 41
        assert api.ended(pen.context_id, queued["turn_id"])["status"] == "completed"
        assert types(api.attach(pen.context_id))[-1] == "heartbeat"
        api.close()


def test_a_producer_may_write_through_any_server(postgresql_url: str) -> None:
    """One numbering; what one has stored, the other gives to who asks for it, and never a head below.

    Without `to_sequence` news may be late by the look that a server takes at the others' (§4.2).
    """
    with Server(postgresql_url, settings=FAST) as one, Server(postgresql_url, settings=FAST) as two:
        first, second = Api(one.url), Api(two.url)
        context_id = first.create()
        pens = [Pen(first, context_id), Pen(second, context_id)]
        pens[0].open()
        for n in range(20):
            writer, reader = pens if n % 3 else reversed(pens)
            ok(writer.batch(*numbered(n + 1, f"{n} "), epoch=1))
            assert writer.pull(from_sequence=n)["content"] == f"{n} "
            assert reader.message()["current_sequence"] == n + 1
            assert reader.pull(from_sequence=n, to_sequence=n + 1)["content"] == f"{n} "
            assert reader.pull(from_sequence=n + 1)["head_sequence"] == n + 1
        ok(pens[1].put(producer={"id": "worker-2"}))
        problem(pens[0].post({"content": "x", "epoch": 1}), 409, "stale_producer")
        ok(pens[0].complete(final_sequence=20))
        until(lambda: pens[1].pull(from_sequence=20)["final"], "the end at the other")
        assert second.text(context_id, "out") == "".join(f"{n} " for n in range(20))
        first.close()
        second.close()
