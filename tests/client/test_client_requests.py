"""The client's requests: what they send, what they make of answers and refusals."""

import asyncio
import json

import pytest
from fake_contextd import FakeContextd

from contextd.client import ApiError, Client, ClientError, UnreachableError


async def test_contexts_are_listed_over_all_pages(fake: FakeContextd, client: Client) -> None:
    """The iterator follows `next_cursor` to the end, and filters by state."""
    fake.page_limit = 2
    for number in range(5):
        fake.add(f"c{number}", state="failed" if number % 2 else "idle")
    assert [context.id async for context in client.contexts()] == [f"c{n}" for n in range(5)]
    assert [c.id async for c in client.contexts(state=["failed"])] == ["c1", "c3"]
    page = await client.list_contexts(limit=2)
    assert page.next_cursor == "2"
    assert (await client.list_contexts(limit=2, cursor="4")).next_cursor is None


async def test_a_context_is_made_read_and_deleted(fake: FakeContextd, client: Client) -> None:
    """Fields go into the body; fields of the future in the answer are ignored."""
    made = await client.create_context(id="c", title="Tea")
    assert (made.id, made.title, made.state) == ("c", "Tea", "idle")
    assert (await client.get_context("c")).title == "Tea"
    await client.delete_context("c")
    with pytest.raises(ApiError) as caught:
        await client.get_context("c")
    assert (caught.value.status, caught.value.code) == (404, "context_not_found")
    assert caught.value.problem["type"] == "context_not_found"


@pytest.mark.parametrize("context_id", [".", "..", "a:b", "a.b_c-d"])
async def test_every_legal_id_reaches_the_server(
    fake: FakeContextd, client: Client, context_id: str
) -> None:
    """`.` and `..` are ids (§1), though URLs know them as folders."""
    fake.add(context_id)
    assert (await client.get_context(context_id)).id == context_id


async def test_messages_have_all_their_text(fake: FakeContextd, client: Client) -> None:
    """What a page leaves out is pulled; without `content` nothing is."""
    context = fake.add("c")
    fake.page_limit, fake.page_chunks_max, fake.faults.chunks_per_pull = 1, 2, 2
    fake.append(context, "m", *"abcdefg")
    fake.append(context, "n", "x")
    found = [message async for message in client.messages("c", content=True)]
    assert [(m.id, m.content, m.content_sequence) for m in found] == [
        ("m", "abcdefg", 7),
        ("n", "x", 1),
    ]
    assert fake.pulls == [("m", 2), ("m", 4), ("m", 6)]
    bare = [message async for message in client.messages("c")]
    assert [message.id for message in bare] == ["m", "n"]
    assert len(fake.pulls) == 3


async def test_a_page_that_promises_too_much_is_no_trap(fake: FakeContextd, client: Client) -> None:
    """The server has less than its list said: the reader takes what there is."""
    context = fake.add("c")
    fake.page_chunks_max, fake.faults.chunks_per_pull = 1, 0
    fake.append(context, "m", "a", "b")
    found = [message async for message in client.messages("c", content=True)]
    assert [(m.content, m.content_sequence) for m in found] == [("a", 1)]


async def test_a_pull_has_exactly_what_comes_after(fake: FakeContextd, client: Client) -> None:
    """`from_sequence` is what is held; a range is bounded and says nothing of the head."""
    fake.append(fake.add("c"), "m", *"abcdef")
    answer = await client.pull("c", "m", 2)
    assert (answer.from_sequence, answer.sequence, answer.content) == (2, 6, "cdef")
    assert (answer.head_sequence, answer.final) == (6, False)
    part = await client.pull_range("c", "m", 1, 3)
    assert (part.sequence, part.content) == (3, "bc")
    await client.pull("c", "m", 6, wait_s=1.5)
    assert fake.queries == [
        {"from_sequence": ["2"]},
        {"from_sequence": ["1"], "to_sequence": ["3"]},
        {"from_sequence": ["6"], "wait": ["1.5"]},
    ]


async def test_a_pull_is_repeated_while_the_failure_may_pass(
    fake: FakeContextd, client: Client
) -> None:
    """Three failures are borne, the fourth is raised."""
    fake.append(fake.add("c"), "m", "x")
    fake.faults.refuse_pulls, fake.faults.cut_pulls = [503, 503], 1
    assert (await client.pull("c", "m")).content == "x"
    fake.faults.refuse_pulls = [503] * 4
    with pytest.raises(ApiError) as caught:
        await client.pull("c", "m")
    assert (caught.value.code, caught.value.passing) == ("overloaded", True)


async def test_a_long_wait_is_not_sat_out(fake: FakeContextd, client: Client) -> None:
    """A server that asks for more than ten seconds is told on at once."""
    fake.append(fake.add("c"), "m", "x")
    fake.faults.refuse_pulls, fake.faults.retry_after = [503], "11"
    with pytest.raises(ApiError) as caught:
        await client.pull("c", "m")
    assert caught.value.retry_after_s == 11
    assert fake.pulls == [("m", 0)]


async def test_a_send_whose_answer_is_lost_starts_one_turn(
    fake: FakeContextd, client: Client
) -> None:
    """It is repeated with the same message id (§3.1)."""
    context = fake.add("c")
    fake.faults.refuse_sends = [503]
    answer = await client.send("c", "hi", client_metadata={"from": "test"})
    sends = [path for method, path in fake.requests if method == "POST"]
    assert len(sends) == 2
    assert list(fake.sends) == [answer.message_id]
    assert list(context.turns) == [answer.turn_id]
    assert fake.sends[answer.message_id] == {
        "message_id": answer.message_id,
        "payload": {"type": "text", "content": "hi"},
        "client_metadata": {"from": "test"},
    }


async def test_turns_and_the_journal_are_read(fake: FakeContextd, client: Client) -> None:
    """Turns, one turn, transitions, retry."""
    context = fake.add("c")
    answer = await client.send("c", "hi")
    assert answer.turn_id
    assert (await client.get_turn("c", answer.turn_id)).id == answer.turn_id
    assert [turn.id async for turn in client.turns("c")] == list(context.turns)
    assert [entry.trigger async for entry in client.transitions("c")] == ["finish"]
    assert (await client.get_message("c", answer.message_id)).role == "user"
    assert (await client.retry("c")).turn_id == "t-again"
    assert (await client.retry_turn("c", "one")).turn_id == "one-again"


async def test_a_turn_is_tried_again(real: Client) -> None:
    """Of one turn or of the last; `from_start` asks for its tools anew (§6)."""
    context = await real.create_context()
    steps = [{"tool_call": {"name": "nope", "arguments": {}}}, {"error": "fatal"}]
    turn_id = (await real.send(context.id, json.dumps({"script": steps}))).turn_id
    calls = []
    for from_start in (False, True):
        await failed(real, context.id, turn_id)
        retry = real.retry_turn(context.id, turn_id, from_start=from_start)
        turn_id = (await retry).turn_id
        await failed(real, context.id, turn_id)
        calls.append(len([call async for call in real.tool_calls(context.id)]))
    assert calls == [1, 2]
    turn_id = (await real.retry(context.id, from_start=True)).turn_id
    await failed(real, context.id, turn_id)
    assert len([call async for call in real.tool_calls(context.id)]) == 3


async def failed(client: Client, context_id: str, turn_id: str | None) -> None:
    async with asyncio.timeout(20):
        while (await client.get_turn(context_id, turn_id or "")).status != "failed":
            await asyncio.sleep(0.005)


async def test_a_cancel_with_a_turn_names_it_in_the_path(
    fake: FakeContextd, client: Client
) -> None:
    """So that a queued turn is taken out, too (§6)."""
    fake.add("c")
    assert (await client.cancel("c")).cancelled_turn_id is None
    assert (await client.cancel("c", "t")).cancelled_turn_id is None
    assert fake.requests == [("POST", "/contexts/c/cancel"), ("POST", "/contexts/c/turns/t/cancel")]


async def test_nobody_there_is_said_in_one_line() -> None:
    """Connection refused names the address; so does something that is no address."""
    for url in ("http://127.0.0.1:1", "nonsense", "http://[broken"):
        with pytest.raises(UnreachableError) as caught:
            async with Client(url) as client:
                await client.get_context("c")
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)


async def test_an_answer_that_is_not_contextds_is_refused(
    fake: FakeContextd, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of somebody else's server is an error of ours, not a crash."""

    async def page(_: FakeContextd, request: object) -> None:
        await request.begin(200, "text/html")  # type: ignore[attr-defined]
        await request.more(b"<h1>It works!</h1>", last=True)  # type: ignore[attr-defined]

    monkeypatch.setattr(FakeContextd, "_route", page)
    with pytest.raises(ClientError) as caught:
        await client.get_context("c")
    assert isinstance(caught.value, ApiError)
    assert caught.value.code == "unexpected_answer"
