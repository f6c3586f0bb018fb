"""What a producer tries although it must be refused: it says nothing against what is stored already."""

from typing import Any

from producer_link import MessageLink
from raw_http import BrokenError

CHUNK_BYTES_MAX = 64 * 1024
HALF_CHUNKS_MAX = 10


async def try_what_is_forbidden(link: MessageLink) -> None:
    """Only while nothing is on its way, so that it is known what must be answered."""
    message, standing = link.message, link.standing
    if standing.in_doubt or not message.numbered or not message.fenced:
        return
    forbidden = ["gap", "large", "early end", "halfway"]
    if standing.head > standing.base:
        forbidden += ["other text", "good and bad"]
    what = link.random.choice(forbidden)
    link.count(f"forbidden, {what}")
    if what == "halfway":
        await _stop_halfway(link)
    else:
        await _expect_refusal(link, what)
        told = await link.look()
        if told["current_sequence"] != standing.head:
            link.accuse("a refusal that was stored", what=what, now=told["current_sequence"])


async def _expect_refusal(link: MessageLink, what: str) -> None:
    target = f"{link.path}/{'complete' if what == 'early end' else 'chunks'}"
    status, code, facts, body = _forbidden(what, link.standing.head)
    answer = await link.wire.ask("POST", target, {**link.fence, **body})
    if (answer.status, answer.code) != (status, code):
        link.refused(what, answer)
    told = answer.json()
    if any(told.get(name) != fact for name, fact in facts.items()):
        link.wrong(f"a refusal of {what} with other facts", answer)


def _forbidden(what: str, head: int) -> tuple[int, str, dict[str, int], dict[str, Any]]:
    """Status, code and facts of the refusal, and the body that asks for it."""
    gap = {"expected_sequence": head + 1}
    other = {"sequence": head, "content": "other text"}
    match what:
        case "gap":
            return 409, "sequence_gap", gap, {"sequence": head + 2, "content": "too early"}
        case "early end":
            return 409, "sequence_gap", gap, {"final_sequence": head + 1}
        case "large":
            large = "é" * (CHUNK_BYTES_MAX // 2) + "x"
            limit = {"limit_bytes": CHUNK_BYTES_MAX}
            return 413, "payload_too_large", limit, {"sequence": head + 1, "content": large}
        case "other text":
            return 409, "sequence_conflict", {"sequence": head}, other
        case _:
            both = [{"sequence": head + 1, "content": "good"}, other]
            return 409, "sequence_conflict", {"sequence": head}, {"chunks": both}


async def _stop_halfway(link: MessageLink) -> None:
    """What was sent whole may be stored, or some of it; a broken request is no success."""
    head = link.standing.head
    last = min(link.message.chunks, head + HALF_CHUNKS_MAX)
    if last == head:
        return
    link.note_sending(last)
    chunks = [link.chunk(place) for place in range(head + 1, last + 1)]
    answer = await link.wire.stop_halfway(f"{link.path}/chunks", [link.fence, *chunks])
    if answer is not None and answer.status == 200:
        link.wrong("half a request that was answered as whole", answer)
    link.count("half requests answered", int(answer is not None))
    raise BrokenError("on purpose")
