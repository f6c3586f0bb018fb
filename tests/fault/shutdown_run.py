"""SIGTERM with many open streams and running turns (§4.2): a clean end for all, and nothing lost."""

import asyncio
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from evidence import Evidence
from fleet import SETTINGS
from raw_http import BrokenError, Connection, Event, EventStream
from serving import Server
from verdict import check_whole
from witness import SQLITE_PREFIX, Witness

EXIT_S_MAX = (
    10.0  # bounds a hang on a busy machine; the goal of 3 s is measured in tests/benchmarks
)
DESCRIPTORS = 8192
OPEN_TOGETHER = 50
CHUNKS = 400
RATE = 20  # slow enough that no turn ends before the signal to stop
LATE_SENDS = 20  # answered before the signal to stop
TEXT_STEP = {"repeat": CHUNKS, "text": "🙂\r\n\\ "}
WANTED = str(TEXT_STEP["text"]) * CHUNKS
FINISH_S_MAX = 60.0


@dataclass
class _Open:
    """One stream, and what it was told until its end."""

    context_id: str
    stream: EventStream
    positions: dict[str, int] = field(default_factory=dict)
    current: asyncio.Event = field(default_factory=asyncio.Event)
    broken: str | None = None


async def run_shutdown(
    *, streams: int, turns: int, seed: str, folder: Path, url: str | None = None
) -> dict[str, Any]:
    """Raises `AssertionError` when anything was wrong; else what was measured."""
    url = url or f"{SQLITE_PREFIX}{folder / 'shutdown.db'}"
    evidence = Evidence(seed)
    _allow_descriptors()
    server = Server(url, settings={**SETTINGS, "scripted_rate": RATE, "shutdown_s": 8})
    await asyncio.to_thread(server.start)
    try:
        ids = [f"s{number}" for number in range(turns)]
        sent = {context_id: await _send(server.port, context_id) for context_id in ids}
        opened = await _open_streams(server.port, ids, streams)
        listening = [asyncio.create_task(_listen(one)) for one in opened]
        await asyncio.gather(*(one.current.wait() for one in opened))
        under_way = asyncio.Event()
        late = asyncio.create_task(_send_until_refused(server.port, ids, Random(seed), under_way))
        await under_way.wait()
        started = time.monotonic()
        code = await asyncio.to_thread(server.stop)
        exit_s = time.monotonic() - started
        await asyncio.gather(*listening)
        sent_late = await late
        _check_ends(evidence, opened, code, exit_s, server.log)
    finally:
        await asyncio.to_thread(server.kill)
    told = _told(opened)
    await _check_kept(evidence, url, told, sent, sent_late)
    await _check_recovered(evidence, url, ids)
    evidence.require_none()
    retries = [one.stream.retry_ms or 0 for one in opened]
    return {
        "streams": streams,
        "turns": turns,
        "exit_s": round(exit_s, 3),
        "exit code": code,
        "streams that ended cleanly": sum(one.stream.ended_cleanly for one in opened),
        "retry_ms, least and most": [min(retries), max(retries)],
        "messages told": len(told),
        "sends answered before the end": len(sent_late),
    }


def _allow_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _send(port: int, context_id: str) -> dict[str, Any]:
    connection = Connection(port)
    await connection.request("POST", "/contexts", body=json.dumps({"id": context_id}).encode())
    script = json.dumps({"script": [{"thinking": "well "}, TEXT_STEP]})
    body = {"message_id": f"{context_id}.1", "payload": {"type": "text", "content": script}}
    answer = await connection.request(
        "POST", f"/contexts/{context_id}/messages", body=json.dumps(body).encode()
    )
    connection.close()
    assert answer.status == 202, answer
    found: dict[str, Any] = answer.json()
    return found


async def _open_streams(port: int, ids: list[str], count: int) -> list[_Open]:
    gate = asyncio.Semaphore(OPEN_TOGETHER)

    async def open_one(number: int) -> _Open:
        context_id = ids[number % len(ids)]
        async with gate:
            stream = await EventStream.open(port, f"/contexts/{context_id}/stream")
        assert stream.status == 200, stream
        return _Open(context_id, stream)

    return await asyncio.gather(*(open_one(number) for number in range(count)))


async def _listen(one: _Open) -> None:
    try:
        async for event in one.stream.events(60.0):
            _hear(one, event)
    except BrokenError as error:
        one.broken = str(error)
    finally:
        one.current.set()
        one.stream.close()


def _hear(one: _Open, event: Event) -> None:
    signal = json.loads(event.data)
    if signal["type"] == "heartbeat":
        one.current.set()
    elif signal["type"] == "content_delta":
        one.positions[signal["message_id"]] = signal["current_sequence"]
    elif signal["type"] == "message_completed":
        one.positions[signal["message_id"]] = signal["final_sequence"]


async def _send_until_refused(
    port: int, ids: list[str], random: Random, under_way: asyncio.Event
) -> list[str]:
    """Notes that are sent until the server has stopped: what it has answered must stay."""
    connection, taken = Connection(port), []
    try:
        for number in range(2, 10_000):
            context_id = random.choice(ids)
            message_id = f"{context_id}.{number}"
            body = {
                "message_id": message_id,
                "role": "system",  # the model would answer a user's
                "payload": {"type": "text", "content": "late"},
                "respond": False,
            }
            answer = await connection.request(
                "POST", f"/contexts/{context_id}/messages", body=json.dumps(body).encode()
            )
            if answer.status == 201:
                taken.append(message_id)
                if len(taken) == LATE_SENDS:
                    under_way.set()
            elif answer.status == 503:
                break
            else:
                raise AssertionError(answer)
    except BrokenError:
        pass
    finally:
        under_way.set()
        connection.close()
    return taken


def _check_ends(
    evidence: Evidence, opened: list[_Open], code: int, exit_s: float, log: str
) -> None:
    if code != 0 or exit_s >= EXIT_S_MAX:
        evidence.fault("a slow or bad exit", code=code, seconds=exit_s, log=log[-2000:])
    unclean = [one for one in opened if not one.stream.ended_cleanly or one.stream.retry_ms is None]
    if unclean:
        evidence.fault("streams without a clean end", count=len(unclean), first=unclean[0].broken)
    retries = Counter(one.stream.retry_ms for one in opened)
    if len(opened) >= 100 and len(retries) < len(opened) // 10:
        evidence.fault("reconnects that are not spread", retries=len(retries))


def _told(opened: list[_Open]) -> dict[str, int]:
    told: dict[str, int] = {}
    for one in opened:
        for message_id, position in one.positions.items():
            told[message_id] = max(told.get(message_id, 0), position)
    return told


async def _check_kept(
    evidence: Evidence,
    url: str,
    told: dict[str, int],
    sent: dict[str, dict[str, Any]],
    sent_late: list[str],
) -> None:
    """Before any start: what was told and answered is in the database."""
    truth = await Witness(url).open()
    try:
        rows = await truth.rows(
            "SELECT m.id, h.head FROM messages m JOIN heads h ON h.message_key = m.key"
        )
        heads = {row[0]: row[1] for row in rows}
        for message_id, position in told.items():
            if heads.get(message_id, -1) < position:
                evidence.fault("a lost position", message=message_id, told=position)
        answered = [answer["message_id"] for answer in sent.values()] + sent_late
        if missing := [message_id for message_id in answered if message_id not in heads]:
            evidence.fault("lost sends", ids=missing[:5])
        await check_whole(truth, evidence, at_rest=False)
    finally:
        await truth.close()


async def _check_recovered(evidence: Evidence, url: str, ids: list[str]) -> None:
    """The next start goes on with every turn, and each ends with exactly its text."""
    server = Server(url, settings={**SETTINGS, "scripted_rate": 0})
    await asyncio.to_thread(server.start)
    truth = await Witness(url).open()
    try:
        async with asyncio.timeout(FINISH_S_MAX):
            while any(state != "idle" for state, _ in (await truth.states()).values()):
                await asyncio.sleep(0.05)
        for context_id in ids:
            row = await truth.context(context_id)
            assert row is not None
            messages = await truth.messages(row.key)
            (turn,) = await truth.turns(row.key)
            texts = [
                (message.kind, message.text)
                for message in messages
                if message.role == "assistant" and not message.superseded
            ]
            if turn.status != "completed" or texts != [("thinking", "well "), ("text", WANTED)]:
                evidence.fault("a turn that was not recovered", context=context_id, turn=turn)
        await check_whole(truth, evidence)
    finally:
        await truth.close()
        await asyncio.to_thread(server.stop)
