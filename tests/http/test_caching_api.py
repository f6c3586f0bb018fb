"""§3.3 at the wire: the bare text, and what caches are told."""

import pytest
from bodies import CHUNKS
from wire import Api, Json, ok, script

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


@pytest.mark.parametrize("form", ["{0}", "W/{0}", '"other", {0}', '{0},W/"x"', "*"])
def test_if_none_match_as_http_has_it(api: Api, closed: tuple[str, str], form: str) -> None:
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
