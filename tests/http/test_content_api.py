"""§3.3 at the wire: pulls, waiting ones, large ones, and chunks one by one."""

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from bodies import CHUNKS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import ENDLESS, TIMESTAMP, Api, Json, invalid, ok, problem, script, until

PULL_FIELDS = {
    "context_id", "message_id", "from_sequence", "sequence", "content", "head_sequence", "status",
    "final",
}  # fmt: skip
RANGE_FIELDS = {"context_id", "message_id", "from_sequence", "sequence", "content"}


def waiting(
    pool: ThreadPoolExecutor, api: Api, message: tuple[str, str], wait: int
) -> Future[Json]:
    return pool.submit(api.pull, *message, from_sequence=3, wait=wait)


# Ranges


def test_a_pull_starts_after_what_the_reader_holds(api: Api, closed: tuple[str, str]) -> None:
    """from_sequence is exclusive: content is chunks N+1 to sequence and nothing of those up to N."""
    for held in range(len(CHUNKS) + 1):
        answer = api.pull(*closed, from_sequence=held)
        assert answer == {
            "context_id": closed[0],
            "message_id": closed[1],
            "from_sequence": held,
            "sequence": len(CHUNKS),
            "content": "".join(CHUNKS[held:]),
            "head_sequence": len(CHUNKS),
            "status": "completed",
            "final": True,
        }


def test_absent_and_zero_are_the_start(api: Api, closed: tuple[str, str]) -> None:
    """Without from_sequence: from the start."""
    assert api.pull(*closed) == api.pull(*closed, from_sequence=0)
    assert api.pull(*closed)["content"] == "".join(CHUNKS)


def test_to_sequence_is_inclusive_and_answers_only_what_never_changes(
    api: Api, closed: tuple[str, str]
) -> None:
    """Five fields, so that the answer may be cached for ever."""
    for start in range(len(CHUNKS) + 1):
        for end in range(start, len(CHUNKS) + 1):
            answer = api.pull(*closed, from_sequence=start, to_sequence=end)
            assert set(answer) == RANGE_FIELDS
            assert answer["from_sequence"] == start
            assert answer["sequence"] == end
            assert answer["content"] == "".join(CHUNKS[start:end])


def test_to_sequence_beyond_the_head_ends_at_the_head(
    api: Api, open_message: tuple[str, str]
) -> None:
    """What there is, and not cached: it has not been reached."""
    response = api.get_content(*open_message, from_sequence=1, to_sequence=9)
    answer = ok(response)
    assert (answer["sequence"], answer["content"]) == (3, "and on ")
    assert response.headers["cache-control"] == "no-cache"


def test_ahead_of_the_head_is_answered_with_the_truth(
    api: Api, closed: tuple[str, str], open_message: tuple[str, str]
) -> None:
    """200 at once, empty, sequence N, final false: also with wait, also of a closed message."""
    for params in ({}, {"wait": 30}):
        answer = api.pull(*open_message, from_sequence=99, **params)
        assert (answer["content"], answer["sequence"], answer["from_sequence"]) == ("", 99, 99)
        assert answer["final"] is False
        assert answer["head_sequence"] == 3
        assert answer["status"] == "streaming"
        answer = api.pull(*closed, from_sequence=len(CHUNKS) + 1, **params)
        assert (answer["content"], answer["sequence"]) == ("", len(CHUNKS) + 1)
        assert answer["final"] is False
        assert answer["head_sequence"] == len(CHUNKS)


def test_nothing_new_is_an_empty_answer(api: Api, open_message: tuple[str, str]) -> None:
    """sequence equals from_sequence, and it is not final while the message is open."""
    answer = api.pull(*open_message, from_sequence=3)
    assert set(answer) == PULL_FIELDS
    assert (answer["sequence"], answer["content"], answer["final"]) == (3, "", False)
    assert (answer["head_sequence"], answer["status"]) == (3, "streaming")


def test_an_empty_closed_message_is_final(api: Api, context_id: str) -> None:
    """A message without chunks has position 0, and nothing will ever follow."""
    message = api.reply(context_id, script({"error": "fatal"}))
    answer = api.pull(context_id, message["id"])
    assert (answer["sequence"], answer["head_sequence"], answer["content"]) == (0, 0, "")
    assert (answer["final"], answer["status"]) == (True, "failed")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("from_sequence=-1", "from_sequence"),
        ("from_sequence=1.5", "from_sequence"),
        ("from_sequence=1.0", "from_sequence"),
        ("from_sequence=x", "from_sequence"),
        ("from_sequence=", "from_sequence"),
        ("from_sequence", "from_sequence"),
        ("from_sequence=1e2", "from_sequence"),
        ("from_sequence=0x1", "from_sequence"),
        ("from_sequence=1_0", "from_sequence"),
        ("from_sequence=%2B1", "from_sequence"),
        ("from_sequence=%201", "from_sequence"),
        ("from_sequence=%C2%B2", "from_sequence"),
        ("from_sequence=%D9%A1", "from_sequence"),
        ("from_sequence=NaN", "from_sequence"),
        ("from_sequence=99999999999999999999", "from_sequence"),
        ("from_sequence=1&from_sequence=2", "from_sequence"),
        ("to_sequence=-1", "to_sequence"),
        ("to_sequence=x", "to_sequence"),
        ("to_sequence=", "to_sequence"),
        ("from_sequence=3&to_sequence=2", "to_sequence"),
        ("wait=31", "wait"),
        ("wait=30.001", "wait"),
        ("wait=-1", "wait"),
        ("wait=x", "wait"),
        ("wait=", "wait"),
        ("wait=nan", "wait"),
        ("wait=inf", "wait"),
        ("wait=1_0", "wait"),
        ("colour=red", "colour"),
        ("from=1", "from"),
        ("limit=1", "limit"),
    ],
)
def test_a_wrong_parameter_of_a_pull_is_named(
    api: Api, closed: tuple[str, str], query: str, field: str
) -> None:
    """400 with its name; never taken for something else."""
    path = f"/contexts/{closed[0]}/messages/{closed[1]}/content"
    invalid(api.http.get(f"{path}?{query}"), field)


def test_unknown_messages_are_404(api: Api, context_id: str, closed: tuple[str, str]) -> None:
    """message_not_found with the id: of no message, of another context's, of what is no id."""
    for message_id in ("nothing", closed[1], "x" * 65):
        for params in ({}, {"wait": 30}, {"to_sequence": 1}):
            response = api.get_content(context_id, message_id, **params)
            refusal = problem(response, 404, "message_not_found")
            assert refusal["message_id"] == message_id
        response = api.http.get(f"/contexts/{context_id}/messages/{message_id}/chunks")
        problem(response, 404, "message_not_found")


# Waiting


def test_a_waiting_pull_is_answered_by_the_next_chunk(api: Api, context_id: str) -> None:
    """wait holds the answer until there is something after N."""
    api.send(context_id, script({"text": "one "}, {"delay_ms": 300}, {"text": "two"}))
    message_id = api.opened(context_id)["message_id"]
    answer = api.pull(context_id, message_id, from_sequence=1, wait=30)
    assert answer["sequence"] == 2
    assert answer["content"] == "two"


def test_a_waiting_pull_is_answered_by_the_end(api: Api, open_message: tuple[str, str]) -> None:
    """Or until the message is closed: then final, with empty content."""
    with ThreadPoolExecutor(1) as pool:
        answer = waiting(pool, api, open_message, 30)
        api.cancel(open_message[0])
        pulled = answer.result(timeout=20)
    assert (pulled["content"], pulled["sequence"]) == ("", 3)
    assert (pulled["final"], pulled["status"]) == (True, "cancelled")


def test_a_wait_that_has_passed_is_an_empty_answer(api: Api, open_message: tuple[str, str]) -> None:
    """200 with nothing new; fractions of a second are times too."""
    for wait in (0, 0.05, "0.1"):
        answer = api.pull(*open_message, from_sequence=3, wait=wait)
        assert (answer["content"], answer["sequence"], answer["final"]) == ("", 3, False)


def test_a_wait_with_something_there_is_no_wait(api: Api, open_message: tuple[str, str]) -> None:
    """What is after N is answered at once."""
    answer = api.pull(*open_message, from_sequence=1, wait=30)
    assert answer["content"] == "and on "


def test_pulls_that_wait_are_bounded(tight: Api) -> None:
    """More than the limit: 503 overloaded with Retry-After; one that does not wait is answered."""
    context_id = tight.create()
    tight.send(context_id, ENDLESS)
    until(lambda: tight.opened(context_id)["current_sequence"] == 3)
    message = context_id, tight.opened(context_id)["message_id"]
    with ThreadPoolExecutor(2) as pool:
        held = [waiting(pool, tight, message, 30)]
        response = until(
            lambda: next(
                (
                    r
                    for r in [tight.get_content(*message, from_sequence=3, wait=0.01)]
                    if r.status_code == 503
                ),
                None,
            )
        )
        problem(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert tight.pull(*message, from_sequence=3)["content"] == ""
        tight.cancel(context_id)
        assert held[0].result(timeout=20)["final"] is True


# Large answers


def test_an_answer_is_bounded_and_the_rest_is_pulled(tight: Api) -> None:
    """At most the limit of text; sequence < head_sequence means: pull again. Whole chunks only."""
    context_id = tight.create()
    message = tight.reply(context_id, script({"repeat": 50, "text": "äöü-----"}))
    held, pieces = 0, []
    while True:
        answer = tight.pull(context_id, message["id"], from_sequence=held)
        assert 0 < len(answer["content"].encode()) <= 100
        assert answer["head_sequence"] == 50
        assert answer["final"] is (answer["sequence"] == 50)
        pieces.append(answer["content"])
        held = answer["sequence"]
        if answer["final"]:
            break
    assert "".join(pieces) == "äöü-----" * 50
    response = tight.get_content(context_id, message["id"], from_sequence=10, to_sequence=40)
    bounded = ok(response)
    assert bounded["sequence"] < 40
    assert bounded["content"] == "äöü-----" * (bounded["sequence"] - 10)
    assert "immutable" not in response.headers["cache-control"]
    assert tight.get_content(context_id, message["id"]).headers["cache-control"] == "no-cache"


def test_a_chunk_above_the_limit_is_answered_whole(tight: Api) -> None:
    """Else its reader would never get on."""
    context_id = tight.create()
    message = tight.reply(context_id, script({"chunks": ["a", "x" * 500, "b"]}))
    assert tight.text(context_id, message["id"]) == "a" + "x" * 500 + "b"
    answer = tight.pull(context_id, message["id"], from_sequence=1)
    assert (answer["sequence"], answer["content"]) == (2, "x" * 500)


def test_a_megabyte_and_more_comes_in_pieces(api: Api, context_id: str) -> None:
    """The default: an answer carries at most 1 MiB of text."""
    message = api.reply(context_id, script({"repeat": 160, "text": "x" * 10_000}))
    answer = api.pull(context_id, message["id"])
    assert len(answer["content"]) <= 2**20
    assert answer["sequence"] < answer["head_sequence"] == 160
    assert answer["final"] is False
    assert len(api.text(context_id, message["id"])) == 160 * 10_000


# Chunks


def test_chunks_come_one_by_one(api: Api, closed: tuple[str, str]) -> None:
    """Each with its sequence and time; from_sequence is exclusive, limit bounds, paging joins."""
    page = api.chunks(*closed)
    assert set(page) == {
        "context_id", "message_id", "chunks", "sequence", "head_sequence", "status", "final",
    }  # fmt: skip
    assert [chunk["content"] for chunk in page["chunks"]] == CHUNKS
    assert [chunk["sequence"] for chunk in page["chunks"]] == list(range(1, len(CHUNKS) + 1))
    for chunk in page["chunks"]:
        assert set(chunk) == {"sequence", "content", "created_at"}
        assert TIMESTAMP.fullmatch(chunk["created_at"])
    assert (page["sequence"], page["head_sequence"]) == (len(CHUNKS), len(CHUNKS))
    assert (page["status"], page["final"]) == ("completed", True)
    held, texts = 0, []
    while held < len(CHUNKS):
        page = api.chunks(*closed, from_sequence=held, limit=4)
        assert 1 <= len(page["chunks"]) <= 4
        assert page["chunks"][0]["sequence"] == held + 1
        texts += [chunk["content"] for chunk in page["chunks"]]
        held = page["sequence"]
        assert held == page["chunks"][-1]["sequence"]
        assert page["final"] is (held == len(CHUNKS))
    assert texts == CHUNKS
    page = api.chunks(*closed, from_sequence=99)
    assert (page["chunks"], page["sequence"], page["final"]) == ([], 99, False)
    assert page["head_sequence"] == len(CHUNKS)


def test_chunks_of_an_open_message_are_not_final(api: Api, open_message: tuple[str, str]) -> None:
    """status and head_sequence are of the same snapshot."""
    page = api.chunks(*open_message)
    assert [chunk["content"] for chunk in page["chunks"]] == ["on ", "and ", "on "]
    assert (page["status"], page["head_sequence"], page["final"]) == ("streaming", 3, False)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=1.5", "limit"),
        ("from_sequence=-1", "from_sequence"),
        ("from_sequence=1.5", "from_sequence"),
        ("from_sequence=x", "from_sequence"),
        ("from_sequence=99999999999999999999", "from_sequence"),
        ("wait=1", "wait"),
        ("to_sequence=1", "to_sequence"),
    ],
)
def test_a_wrong_parameter_of_the_chunks_is_named(
    api: Api, closed: tuple[str, str], query: str, field: str
) -> None:
    """400 with its name."""
    path = f"/contexts/{closed[0]}/messages/{closed[1]}/chunks"
    invalid(api.http.get(f"{path}?{query}"), field)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_cut_of_any_chunking_joins_to_the_whole(api: Api, data: st.DataObject) -> None:
    """content(0..k) + content(k..) is the whole, as JSON, as text and as chunks, for every k."""
    characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    texts = data.draw(
        st.lists(st.text(characters, min_size=1, max_size=8), min_size=1, max_size=12)
    )
    context_id = api.create()
    message = api.reply(context_id, script({"chunks": texts}))
    whole = "".join(texts)
    target = context_id, message["id"]
    assert message["final_sequence"] == len(texts)
    assert message["stats"]["characters"] == len(whole)
    assert message["stats"]["bytes"] == len(whole.encode())
    assert api.pull(*target)["content"] == whole
    k = data.draw(st.integers(0, len(texts)))
    plain = {"accept": "text/plain"}
    left = api.pull(*target, to_sequence=k)
    right = api.pull(*target, from_sequence=k)
    assert left["content"] == "".join(texts[:k])
    assert left["content"] + right["content"] == whole
    left_text = api.get_content(*target, to_sequence=k, headers=plain).content.decode()
    right_text = api.get_content(*target, from_sequence=k, headers=plain).content.decode()
    assert (left_text, right_text) == (left["content"], right["content"])
    assert [chunk["content"] for chunk in api.chunks(*target, from_sequence=k)["chunks"]] == texts[
        k:
    ]
    if k:
        page = api.chunks(*target, limit=k)
        assert [chunk["content"] for chunk in page["chunks"]] == texts[:k]
