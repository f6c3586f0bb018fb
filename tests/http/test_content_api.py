"""§3.3 at the wire: pulls, their headers, caching, and chunks one by one."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import ENDLESS, TIMESTAMP, Api, Json, invalid, ok, problem, script, until

PULL_FIELDS = {
    "context_id", "message_id", "from_sequence", "sequence", "content", "head_sequence", "status",
    "final",
}  # fmt: skip
RANGE_FIELDS = {"context_id", "message_id", "from_sequence", "sequence", "content"}
CHUNKS = ["The ", "quick ", "brown 🦊", "\n", "\n\n", "jumps", " ü", "ber", "…"]


@pytest.fixture(scope="module")
def closed(api: Api) -> tuple[str, str]:
    """A closed message of known chunks."""
    context_id = api.create()
    return context_id, api.reply(context_id, script({"chunks": CHUNKS}))["id"]


@pytest.fixture
def open_message(api: Api, context_id: str) -> Iterator[tuple[str, str]]:
    """An open message that stands at 3 chunks."""
    api.send(context_id, ENDLESS)
    until(lambda: any(m["current_sequence"] == 3 for m in api.context(context_id)["open_messages"]))
    yield context_id, api.opened(context_id)["message_id"]
    api.http.delete(f"/contexts/{context_id}")


def waiting(pool: ThreadPoolExecutor, api: Api, message: tuple[str, str], wait: int) -> Future[Json]:
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


def test_a_wait_that_has_passed_is_an_empty_answer(
    api: Api, open_message: tuple[str, str]
) -> None:
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


# The bare text


def test_plain_text_has_its_position_in_headers(api: Api, closed: tuple[str, str]) -> None:
    """The bare text with Contextd-Sequence, -Head-Sequence, -Status and -Final."""
    response = api.get_content(*closed, from_sequence=2, headers={"accept": "text/plain"})
    assert response.status_code == 200
    assert response.headers["content-type"].replace(" ", "").lower() == "text/plain;charset=utf-8"
    assert response.content.decode() == "".join(CHUNKS[2:])
    assert response.headers["contextd-sequence"] == str(len(CHUNKS))
    assert response.headers["contextd-head-sequence"] == str(len(CHUNKS))
    assert response.headers["contextd-status"] == "completed"
    assert response.headers["contextd-final"] == "true"


def test_plain_text_of_a_range_has_only_its_sequence(api: Api, closed: tuple[str, str]) -> None:
    """With to_sequence only the first header: the others may change."""
    response = api.get_content(
        *closed, from_sequence=1, to_sequence=3, headers={"accept": "text/plain"}
    )
    assert response.text == "".join(CHUNKS[1:3])
    mine = {name: value for name, value in response.headers.items() if "contextd-" in name}
    assert mine == {"contextd-sequence": "3"}


def test_plain_text_of_an_open_message_is_not_final(
    api: Api, open_message: tuple[str, str]
) -> None:
    """Contextd-Final: false, with the status and the head."""
    response = api.get_content(*open_message, headers={"accept": "text/plain"})
    assert response.text == "on and on "
    assert response.headers["contextd-final"] == "false"
    assert response.headers["contextd-status"] == "streaming"
    assert response.headers["contextd-head-sequence"] == "3"


@pytest.mark.parametrize(
    ("accept", "type_"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/plain", "text/plain"),
        ("text/*", "text/plain"),
        ("TEXT/PLAIN", "text/plain"),
        ("text/plain; charset=utf-8", "text/plain"),
        ("text/plain;q=0.9, application/json;q=0.1", "text/plain"),
        ("text/plain;q=0.1, application/json", "application/json"),
        ("text/plain, */*;q=0.5", "text/plain"),
    ],
)
def test_accept_decides_the_form(
    api: Api, closed: tuple[str, str], accept: str | None, type_: str
) -> None:
    """As HTTP's negotiation says; JSON where nothing is preferred."""
    path = f"/contexts/{closed[0]}/messages/{closed[1]}/content"
    request = api.http.build_request("GET", path)
    del request.headers["accept"]
    if accept is not None:
        request.headers["accept"] = accept
    response = api.http.send(request)
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == type_


@pytest.mark.parametrize("accept", ["application/json", "text/plain"])
@pytest.mark.parametrize("params", [{}, {"from_sequence": 2, "to_sequence": 4}])
def test_head_is_get_without_a_body(
    api: Api, closed: tuple[str, str], accept: str, params: Json
) -> None:
    """The same status and headers, no body."""
    path = f"/contexts/{closed[0]}/messages/{closed[1]}/content"
    got = api.http.get(path, params=params, headers={"accept": accept})
    head = api.http.head(path, params=params, headers={"accept": accept})
    assert head.status_code == 200
    assert head.content == b""
    volatile = {"date"}
    assert {k: v for k, v in head.headers.items() if k not in volatile} == {
        k: v for k, v in got.headers.items() if k not in volatile
    }
    missing = api.http.head(f"/contexts/{closed[0]}/messages/none/content")
    assert (missing.status_code, missing.content) == (404, b"")


# Caching


def test_what_can_never_change_is_immutable(
    api: Api, closed: tuple[str, str], open_message: tuple[str, str]
) -> None:
    """Final, or a to_sequence that is reached: public (no auth), a long max-age, immutable."""
    for message, params in (
        (closed, {}),
        (closed, {"from_sequence": len(CHUNKS)}),
        (closed, {"from_sequence": 2, "to_sequence": 5}),
        (open_message, {"to_sequence": 3}),
        (open_message, {"from_sequence": 1, "to_sequence": 2}),
    ):
        control = api.get_content(*message, **params).headers["cache-control"]
        directives = {part.strip() for part in control.split(",")}
        assert {"immutable", "public"} <= directives, (params, control)
        ages = [int(part.partition("=")[2]) for part in directives if part.startswith("max-age=")]
        assert ages, control
        assert ages[0] >= 86_400


def test_what_can_change_is_asked_for_again(
    api: Api, closed: tuple[str, str], open_message: tuple[str, str]
) -> None:
    """no-cache: open, ahead, or a range that is not reached."""
    for message, params in (
        (open_message, {}),
        (open_message, {"from_sequence": 3}),
        (open_message, {"from_sequence": 50}),
        (open_message, {"to_sequence": 4}),
        (open_message, {"from_sequence": 9, "to_sequence": 9}),
        (closed, {"from_sequence": 99}),
    ):
        assert api.get_content(*message, **params).headers["cache-control"] == "no-cache", params


def test_every_answer_has_an_etag_and_says_what_it_varies_on(
    api: Api, closed: tuple[str, str], open_message: tuple[str, str]
) -> None:
    """ETag and Vary on each form, and on 304."""
    for message in (closed, open_message):
        for params in ({}, {"from_sequence": 1}, {"to_sequence": 2}, {"wait": 1}):
            for accept in ("application/json", "text/plain"):
                response = api.get_content(*message, headers={"accept": accept}, **params)
                assert response.headers["etag"].startswith('"')
                vary = {part.strip().lower() for part in response.headers["vary"].split(",")}
                assert {"accept", "origin", "authorization"} <= vary
                headers = {"accept": accept, "if-none-match": response.headers["etag"]}
                params_now = {k: v for k, v in params.items() if k != "wait"}
                unchanged = api.get_content(*message, headers=headers, **params_now)
                assert unchanged.status_code == 304
                assert unchanged.content == b""
                assert unchanged.headers["etag"] == response.headers["etag"]
                assert unchanged.headers["vary"] == response.headers["vary"]
                assert "cache-control" in unchanged.headers


def test_etags_differ_where_the_bytes_do(api: Api, closed: tuple[str, str]) -> None:
    """Another range, another form, another message: another tag."""
    other = (closed[0], api.reply(closed[0], script({"chunks": CHUNKS}))["id"])
    tags = [
        api.get_content(*message, headers={"accept": accept}, **params).headers["etag"]
        for message in (closed, other)
        for accept in ("application/json", "text/plain")
        for params in (
            {},
            {"from_sequence": 1},
            {"from_sequence": 2},
            {"to_sequence": 3},
            {"from_sequence": 1, "to_sequence": 3},
            {"from_sequence": 1, "to_sequence": 4},
            {"to_sequence": len(CHUNKS)},
        )
    ]
    assert len(set(tags)) == len(tags)


def test_the_etag_changes_when_the_message_grows_or_closes(
    api: Api, open_message: tuple[str, str]
) -> None:
    """An empty answer that was not final is not the one that is."""
    before = api.get_content(*open_message, from_sequence=3)
    api.cancel(open_message[0])
    headers = {"if-none-match": before.headers["etag"]}
    after = api.get_content(*open_message, from_sequence=3, headers=headers)
    assert ok(after)["final"] is True
    assert after.headers["etag"] != before.headers["etag"]


def test_a_range_keeps_its_etag_while_the_message_grows(api: Api, context_id: str) -> None:
    """What is reached never changes, and its tag neither: open, closed, and pulled from SQL."""
    api.send(context_id, script({"text": "a b "}, {"delay_ms": 200}, {"text": "c"}))
    message_id = api.opened(context_id)["message_id"]
    api.pull(context_id, message_id, from_sequence=1, wait=20)
    before = api.get_content(context_id, message_id, to_sequence=1)
    api.text(context_id, message_id)
    after = api.get_content(context_id, message_id, to_sequence=1)
    assert after.headers["etag"] == before.headers["etag"]
    assert after.content == before.content


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"other", {0}', "{0},W/\"x\"", "*"])
def test_if_none_match_as_http_has_it(
    api: Api, closed: tuple[str, str], form: str
) -> None:
    """Lists, weak tags and `*` (RFC 9110): 304."""
    etag = api.get_content(*closed).headers["etag"]
    response = api.get_content(*closed, headers={"if-none-match": form.format(etag)})
    assert response.status_code == 304


def test_if_none_match_is_ignored_with_wait(api: Api, closed: tuple[str, str]) -> None:
    """Who waits wants to hear something: 200."""
    etag = api.get_content(*closed).headers["etag"]
    response = api.get_content(*closed, wait=1, headers={"if-none-match": etag})
    assert ok(response)["final"] is True


def test_a_tag_of_another_range_is_no_match(api: Api, closed: tuple[str, str]) -> None:
    """200 with the content."""
    etag = api.get_content(*closed, from_sequence=1).headers["etag"]
    assert api.get_content(*closed, headers={"if-none-match": etag}).status_code == 200


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
    texts = data.draw(st.lists(st.text(characters, min_size=1, max_size=8), min_size=1, max_size=12))
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
    assert [chunk["content"] for chunk in api.chunks(*target, from_sequence=k)["chunks"]] == texts[k:]
    if k:
        page = api.chunks(*target, limit=k)
        assert [chunk["content"] for chunk in page["chunks"]] == texts[:k]
