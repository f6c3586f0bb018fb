"""§2 at the wire: creating, reading, listing, changing and deleting contexts."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bodies import CONTEXT_FIELDS, EVERYTHING, EXTERNAL_TOOL
from serving import Server
from wire import ENDLESS, SILENT, TIMESTAMP, UUID7, Api, Json, invalid, ok, problem, until


def test_an_empty_body_makes_an_idle_context_with_every_field(api: Api) -> None:
    """Everything is optional; the answer is a whole Context, and Location says where it is."""
    response = api.http.post("/contexts", json={})
    context = ok(response, 201)
    assert set(context) == CONTEXT_FIELDS
    assert UUID7.fullmatch(context["id"])
    assert response.headers["location"].endswith(f"/contexts/{context['id']}")
    assert context["state"] == "idle"
    assert context["mode"] == "act"
    assert context["on_busy"] == "enqueue"
    assert context["approval_policy"]["mode"] == "auto"
    assert context["approval_policy"]["max_depth"] == 5
    assert context["approval_policy"]["max_calls"] == 20
    assert context["provider"] == "scripted"
    assert context["title"] is context["system_prompt"] is None
    assert context["message_count"] == context["queued_messages"] == 0
    assert context["open_messages"] == context["pending_tool_calls"] == context["tools"] == []
    assert context["metadata"] == {}
    assert context["can_send"] is True
    assert context["record_revision"] <= context["revision"]
    assert isinstance(context["stream_cursor"], str)
    for name in ("created_at", "updated_at"):
        assert TIMESTAMP.fullmatch(context[name])


def test_no_body_is_an_empty_body(api: Api) -> None:
    """The body is all optional; PATCH and a send without one say nothing, and are refused."""
    context_id = str(ok(api.http.post("/contexts"), 201)["id"])
    problem(api.http.patch(f"/contexts/{context_id}"), 400, "invalid_request")
    problem(api.http.post(f"/contexts/{context_id}/messages"), 400, "invalid_request")
    for raw in (b"null", b"[]", b"5"):
        for method, path in (("PATCH", ""), ("POST", "/messages")):
            headers = {"content-type": "application/json"}
            url = f"/contexts/{context_id}{path}"
            response = api.http.request(method, url, content=raw, headers=headers)
            problem(response, 400, "invalid_request")


def test_every_field_is_kept(api: Api) -> None:
    """What is set on creation is what is read."""
    created = ok(api.http.post("/contexts", json=EVERYTHING), 201)
    read = api.context(created["id"])
    assert read == created
    for name, value in EVERYTHING.items():
        if name != "tools":
            assert read[name] == value, name
    assert read["tools"][0] == "read_file"
    assert EXTERNAL_TOOL.items() <= read["tools"][1].items()


def test_create_is_idempotent_by_its_id(api: Api) -> None:
    """The same id and body: 200 and the context as it is now; another body: 409 id_taken."""
    body = {"id": "idempotent:create.1_-", "title": "first", "metadata": {"n": 1, "m": 2}}
    created = ok(api.http.post("/contexts", json=body), 201)
    changed = ok(api.http.patch(f"/contexts/{body['id']}", json={"title": "later"}))
    again = api.http.post("/contexts", json={**body, "metadata": {"m": 2, "n": 1}})
    assert ok(again, 200) == changed
    assert changed["revision"] == created["revision"] + 1
    refusal = problem(api.http.post("/contexts", json={**body, "title": "x"}), 409, "id_taken")
    assert refusal["id"] == body["id"]
    assert "deleted" not in refusal
    assert api.context(str(body["id"]))["title"] == "later"


def test_simultaneous_creates_of_one_id_make_one_context(api: Api) -> None:
    """However many ask at once, one hears 201 and all others 200."""
    body = {"id": "created-at-once", "title": "t"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.http.post("/contexts", json=body), range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"colour": "red"}, "colour"),
        ({"title": 5}, "title"),
        ({"title": "a\u0000b"}, "title"),
        ({"system_prompt": ["x"]}, "system_prompt"),
        ({"mode": "fly"}, "mode"),
        ({"mode": None}, "mode"),
        ({"on_busy": "panic"}, "on_busy"),
        ({"provider": "no-such-provider"}, "provider"),
        ({"metadata": []}, "metadata"),
        ({"metadata": "x"}, "metadata"),
        ({"tools": "read_file"}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"approval_policy": {"mode": "sometimes"}}, "approval_policy.mode"),
        ({"approval_policy": {"max_calls": -1}}, "approval_policy.max_calls"),
        ({"approval_policy": {"max_calls": "7"}}, "approval_policy.max_calls"),
        ({"tools": [{**EXTERNAL_TOOL, "read_only": 1}]}, "tools[0].read_only"),
        ({"tools": [{**EXTERNAL_TOOL, "external": False}]}, "tools[0].external"),
        ({"approval_policy": {"nope": 1}}, "approval_policy.nope"),
        ({"id": ""}, "id"),
        ({"id": "x" * 65}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": "ä"}, "id"),
        ({"id": "a\n"}, "id"),
        ({"id": "\n"}, "id"),
        ({"id": 7}, "id"),
    ],
)
def test_a_wrong_field_is_named(api: Api, body: Json, field: str) -> None:
    """An unknown field, a wrong type and a value out of range are 400 and named (§1)."""
    invalid(api.http.post("/contexts", json=body), field)


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"x"', b"5", b"{'a': 1}", b"\xff\xfe", b"NaN"])
def test_a_body_that_is_no_object_is_refused(api: Api, raw: bytes) -> None:
    """400, never 500 and never a context."""
    headers = {"content-type": "application/json"}
    problem(api.http.post("/contexts", content=raw, headers=headers), 400, "invalid_request")


def test_a_body_nested_without_end_is_refused(api: Api) -> None:
    """Depth is hostile input: the answer is a refusal, not a defect."""
    raw = b'{"metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"
    headers = {"content-type": "application/json"}
    problem(api.http.post("/contexts", content=raw, headers=headers), 400, "invalid_request")


def test_large_numbers_and_odd_text_in_metadata_are_no_defect(api: Api) -> None:
    """What JSON allows is kept or refused with 400, never a 500."""
    for raw in (b"1e400", b"1" * 400, b'"\\ud800"', b'"\\u0000"', b"-0.0", b"18446744073709551616"):
        response = api.http.post(
            "/contexts",
            content=b'{"metadata":{"value":' + raw + b"}}",
            headers={"content-type": "application/json"},
        )
        assert response.status_code in (201, 400), (raw, response.text)
        if response.status_code == 201:
            read = api.http.get(f"/contexts/{response.json()['id']}")
            assert read.status_code == 200, raw
            assert read.json()["metadata"] == response.json()["metadata"], raw


@pytest.mark.parametrize("type_", ["text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_another_media_type_is_refused(api: Api, type_: str) -> None:
    """JSON only: 415. A form is what a browser may post across origins without asking."""
    response = api.http.post("/contexts", content=b"{}", headers={"content-type": type_})
    problem(response, 415, "unsupported_media_type")


def test_a_charset_beside_the_media_type_is_fine(api: Api) -> None:
    """`application/json; charset=utf-8` is JSON."""
    headers = {"content-type": "application/json; charset=utf-8"}
    ok(api.http.post("/contexts", content=b"{}", headers=headers), 201)


@pytest.mark.parametrize("id_", ["no-such-context", "x" * 65, "%20", "a%2Fb", "ä"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("GET", "/messages"),
        ("POST", "/messages"),
        ("GET", "/messages/m"),
        ("GET", "/messages/m/content"),
        ("GET", "/messages/m/content?wait=20"),
        ("GET", "/messages/m/chunks"),
        ("GET", "/turns"),
        ("GET", "/turns/t"),
        ("POST", "/turns/t/cancel"),
        ("GET", "/transitions"),
        ("GET", "/stream"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("POST", "/turns/t/retry"),
    ],
)
def test_an_unknown_context_is_404_everywhere(api: Api, method: str, path: str, id_: str) -> None:
    """context_not_found with the id, on every route below a context."""
    bodies: dict[tuple[str, str], Any] = {
        ("POST", "/messages"): {"payload": {"type": "text", "content": "x"}},
        ("PATCH", ""): {"title": "x"},
        ("POST", "/cancel"): {},
    }
    response = api.http.request(method, f"/contexts/{id_}{path}", json=bodies.get((method, path)))
    if id_ == "a%2Fb":
        assert response.status_code == 404
        assert response.json()["code"] in ("context_not_found", "not_found")
        return
    refusal = problem(response, 404, "context_not_found")
    assert refusal["context_id"] == {"%20": " "}.get(id_, id_)


# Lists


def test_the_list_is_newest_activity_first_and_paged(named: Api) -> None:
    """Pages join to the whole, in the order of the last activity; next_cursor is null at the end."""
    api = named
    ids = [api.create(title=str(n)) for n in range(5)]
    until(lambda: api.http.patch(f"/contexts/{ids[1]}", json={"title": "touched"}).is_success)
    listed = api.walk("/contexts", limit=2)
    assert listed[0]["id"] == ids[1]
    assert {item["id"] for item in listed} == set(ids)
    assert len(listed) == 5
    assert [item["updated_at"] for item in listed] == sorted(
        (item["updated_at"] for item in listed), reverse=True
    )
    page = ok(api.http.get("/contexts"))
    assert set(page) == {"items", "next_cursor"}
    assert page["next_cursor"] is None
    assert page["items"] == listed
    assert set(page["items"][0]) == CONTEXT_FIELDS
    full = ok(api.http.get("/contexts", params={"limit": 5}))
    assert full["next_cursor"] is None  # a full last page needs no empty one after it

    running = api.send(ids[2], SILENT)
    api.in_state(ids[2], "awaiting_llm_response")
    awaiting = api.walk("/contexts", state="awaiting_llm_response")
    assert [item["id"] for item in awaiting] == [ids[2]]
    both = api.walk("/contexts", state=["awaiting_llm_response", "idle"], limit=1)
    assert len(both) == 5
    assert ok(api.http.get("/contexts?state=failed"))["items"] == []
    api.cancel(ids[2], turn_id=running["turn_id"])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=1.5", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=99999999", "limit"),
        ("cursor=%21", "cursor"),
        ("cursor=abcd", "cursor"),
        ("cursor=", "cursor"),
        ("state=asleep", "state"),
        ("state=idle&state=asleep", "state"),
        ("colour=red", "colour"),
        ("limit=1&limit=2", "limit"),
        ("states=idle", "states"),
    ],
)
def test_a_wrong_parameter_of_the_list_is_named(api: Api, query: str, field: str) -> None:
    """400 with the parameter's own name."""
    invalid(api.http.get(f"/contexts?{query}"), field)


# As it is


def test_the_context_says_what_is_open_and_what_waits(api: Api, context_id: str) -> None:
    """open_messages, queued_messages, message_count and can_send follow what happens."""
    api.send(context_id, ENDLESS)
    opened = api.opened(context_id)
    assert set(opened) == {"message_id", "role", "kind", "current_sequence"}
    assert (opened["role"], opened["kind"]) == ("assistant", "text")
    assert opened["current_sequence"] >= 1
    api.send(context_id, "next")
    context = api.context(context_id)
    assert context["queued_messages"] == 1
    assert context["can_send"] is True
    rejecting = ok(api.http.patch(f"/contexts/{context_id}", json={"on_busy": "reject"}))
    assert rejecting["can_send"] is False
    problem(api.post_message(context_id, "x"), 409, "context_busy")
    ok(api.http.patch(f"/contexts/{context_id}", json={"on_busy": "interrupt"}))
    assert api.context(context_id)["can_send"] is True
    api.cancel(context_id)
    context = api.in_state(context_id, "idle")
    until(lambda: api.context(context_id)["queued_messages"] == 0)
    until(lambda: api.context(context_id)["state"] == "idle")
    context = api.context(context_id)
    assert context["open_messages"] == []
    assert context["message_count"] == len(api.messages(context_id)) == 4


# Deleting


def test_a_deleted_context_is_gone_but_for_its_id(api: Api) -> None:
    """204, then 404 everywhere, and its id is never used again: not by the same body either."""
    body = {"id": "to-be-deleted"}
    api.create(**body)
    message = api.reply("to-be-deleted", "hello")
    assert api.pull("to-be-deleted", message["id"])["content"] == "You said: hello"
    response = api.http.delete("/contexts/to-be-deleted")
    assert response.status_code == 204
    assert response.content == b""
    for path in ("", "/messages", f"/messages/{message['id']}", "/turns", "/transitions"):
        problem(api.http.get(f"/contexts/to-be-deleted{path}"), 404, "context_not_found")
    problem(api.get_content("to-be-deleted", message["id"]), 404, "context_not_found")
    problem(api.http.delete("/contexts/to-be-deleted"), 404, "context_not_found")
    for again in (body, {**body, "title": "another"}):
        refusal = problem(api.http.post("/contexts", json=again), 409, "id_taken")
        assert refusal["id"] == "to-be-deleted"
        assert refusal["deleted"] is True
    assert "to-be-deleted" not in [item["id"] for item in api.walk("/contexts", limit=100)]


def test_deleting_a_busy_context_ends_its_turn(api: Api, context_id: str) -> None:
    """In every state; the server goes on as if nothing had been."""
    api.send(context_id, ENDLESS)
    api.send(context_id, "queued")
    api.opened(context_id)
    assert api.http.delete(f"/contexts/{context_id}").status_code == 204
    problem(api.post_message(context_id, "x"), 404, "context_not_found")
    assert api.reply(api.create(), "hello")["status"] == "completed"


def test_a_waiting_pull_of_a_deleted_message_is_answered(api: Api, context_id: str) -> None:
    """Nothing will ever follow, so nobody is kept waiting: 404 long before the wait has passed."""
    api.send(context_id, ENDLESS)
    opened = until(lambda: [m for m in api.context(context_id)["open_messages"]
                            if m["current_sequence"] >= 3])[0]  # fmt: skip
    message_id, held = opened["message_id"], opened["current_sequence"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.get_content, context_id, message_id, from_sequence=held, wait=30)
        assert api.http.delete(f"/contexts/{context_id}").status_code == 204
        problem(waiting.result(timeout=15), 404, "context_not_found")


def test_nothing_of_a_deleted_context_stays_in_the_database(tmp_path: Path) -> None:
    """Everything of it is gone but its id (§2): no chunk is kept until some restart."""
    database = tmp_path / "contextd.db"
    with Server(database, settings={"scripted_rate": 0}) as server:
        api = Api(server.url)
        context_id = api.create(id="gone", title="secret title")
        api.run(context_id, "secret text")
        assert api.http.delete(f"/contexts/{context_id}").status_code == 204

        def rows() -> int:
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                tables = ("contexts", "messages", "heads", "chunks", "turns", "journal", "branches")
                counts = [
                    connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                    for table in tables
                ]
            return sum(counts)

        until(lambda: rows() == 0, "the deletion of all rows")
        api.close()
