"""§1 and §12 at the wire: how refusals look, and what an operator asks."""

import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Server
from wire import Api, Json, problem

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


@pytest.mark.parametrize("path", ["/nothing", "/contexts/x/nothing", "/contexts/x/messages/m/none"])
@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_path_is_404(api: Api, method: str, path: str) -> None:
    """not_found, as a problem, for every method."""
    problem(api.http.request(method, path), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/contexts", {"GET", "POST"}),
        ("/contexts/{0}", {"GET", "PATCH", "DELETE"}),
        ("/contexts/{0}/messages", {"GET", "POST"}),
        ("/contexts/{0}/messages/m/content", {"GET", "HEAD"}),
        ("/contexts/{0}/messages/m/chunks", {"GET", "POST"}),
        ("/contexts/{0}/turns", {"GET"}),
        ("/contexts/{0}/turns/t", {"GET"}),
        ("/contexts/{0}/turns/t/cancel", {"POST"}),
        ("/contexts/{0}/cancel", {"POST"}),
        ("/contexts/{0}/retry", {"POST"}),
        ("/contexts/{0}/turns/t/retry", {"POST"}),
        ("/contexts/{0}/transitions", {"GET"}),
        ("/contexts/{0}/stream", {"GET"}),
        ("/machine", {"GET"}),
        ("/health/live", {"GET"}),
        ("/health/ready", {"GET"}),
        ("/metrics", {"GET"}),
        ("/schema/openapi.json", {"GET"}),
    ],
)
def test_another_method_is_405_with_allow(
    api: Api, context_id: str, path: str, allowed: set[str]
) -> None:
    """Each path says by `Allow` what is possible there (RFC 9110)."""
    path = path.format(context_id)
    for method in set(METHODS) - allowed:
        if (path.count("/"), method) == (4, "PUT") and "/messages/" in path:
            continue  # §7
        response = api.http.request(method, path)
        problem(response, 405, "method_not_allowed")
        said = {name.strip() for name in response.headers["allow"].split(",")}
        assert allowed <= said, (method, said)
        assert said - allowed <= {"OPTIONS", "HEAD"}, (method, said)


def test_a_problem_is_not_cached(api: Api, context_id: str) -> None:
    """What is refused now may be possible in a moment; no cache may answer with it."""
    for path in ("/nothing", "/contexts/nothing", f"/contexts/{context_id}/messages/m/content"):
        response = api.http.get(path)
        assert response.headers["cache-control"] in ("no-store", "no-cache")


def test_every_code_has_one_type_and_title(api: Api, context_id: str) -> None:
    """`type` and `title` belong to the code, `detail` to the case (RFC 9457)."""
    first = problem(api.http.get("/contexts/a"), 404, "context_not_found")
    second = problem(api.http.get("/contexts/b"), 404, "context_not_found")
    other = problem(api.http.get(f"/contexts/{context_id}/messages/m"), 404, "message_not_found")
    assert (first["type"], first["title"]) == (second["type"], second["title"])
    assert first["type"] != other["type"]


def test_several_wrong_parameters_are_all_named(api: Api) -> None:
    """`errors` is a list, an entry for each."""
    response = api.http.get("/contexts?colour=red&shape=round")
    errors = problem(response, 400, "invalid_request")["errors"]
    assert {error["field"] for error in errors} == {"colour", "shape"}


def test_a_refusal_repeats_no_text(api: Api, context_id: str) -> None:
    """No chat text in problems: a log of answers must not become a log of conversations."""
    secret = "xyzzy-secret"
    bodies: list[Json] = [
        {"payload": {"type": "text", "content": secret}, "role": "robot"},
        {"payload": {"type": "text", "content": secret + "\u0000"}},
        {"payload": {"type": "text", "content": secret}, "branch": "none"},
    ]
    for body in bodies:
        response = api.http.post(f"/contexts/{context_id}/messages", json=body)
        assert response.status_code in (400, 404)
        assert secret not in response.text


def test_percent_encoded_garbage_is_no_defect(api: Api, context_id: str) -> None:
    """Bytes that are no UTF-8, control characters, and endless parameters are refusals."""
    for path in (
        "/contexts/%ff%fe",
        "/contexts/%00",
        f"/contexts/{context_id}/messages/%ff/content",
        f"/contexts/{context_id}/stream?%ff=%fe",
        "/contexts?cursor=%ff",
        "/contexts?limit=%00",
        f"/contexts/{context_id}/messages?branch=%0a",
        f"/contexts/{context_id}/messages?branch=main%0a",
        "/contexts?" + "&".join(f"p{n}=1" for n in range(500)),
    ):
        response = api.http.get(path)
        assert response.status_code in (400, 404), (path, response.text)
        assert response.json()["code"] in (
            "invalid_request", "context_not_found", "message_not_found", "not_found",
            "branch_not_found",
        )  # fmt: skip


def test_the_socket_survives_what_is_no_http(server: Server, api: Api) -> None:
    """Garbage ends its own connection and nothing else."""
    for raw in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert api.http.get("/health/live").status_code == 200


def test_a_truncated_body_stores_nothing(server: Server, api: Api, context_id: str) -> None:
    """A connection that breaks within the body sent no message."""
    body = b'{"payload":{"type":"text","content":"half'
    head = (
        f"POST /contexts/{context_id}/messages HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) + 50}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert api.messages(context_id) == []


# §12


def test_the_server_says_that_it_lives_and_is_ready(api: Api) -> None:
    """200 for both, and never from a cache of long ago."""
    for path in ("/health/live", "/health/ready"):
        assert api.http.get(path).status_code == 200


def test_metrics_are_prometheus_text(api: Api, context_id: str) -> None:
    """Every line parses; figures of this server grow with what it does."""

    def figures() -> dict[str, float]:
        response = api.http.get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        families = list(text_string_to_metric_families(response.text))
        assert families
        for family in families:
            assert family.name.startswith("contextd_")
            assert family.documentation
        return {
            sample.name + str(sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    before = figures()
    api.run(context_id, "one two three")
    after = figures()
    assert after["contextd_chunks_written_total[]"] >= before["contextd_chunks_written_total[]"] + 4
    assert after["contextd_commits_total[]"] > before["contextd_commits_total[]"]
    key = "contextd_turns_total[('outcome', 'completed')]"
    assert after[key] >= before.get(key, 0) + 1


def test_a_nul_in_an_object_is_no_defect_on_postgresql(postgresql_url: str) -> None:
    """PostgreSQL cannot store U+0000 in JSON: the request is refused with 400, or kept exactly."""
    with Server(postgresql_url, settings={"scripted_rate": 0}) as server:
        api = Api(server.url)
        for value in ({"a": "x\u0000y"}, {"a\u0000": [1]}):
            context_id = api.create()
            for response in (
                api.http.post("/contexts", json={"metadata": value}),
                api.http.patch(f"/contexts/{context_id}", json={"metadata": value}),
                api.post_message(context_id, "x", respond=False, client_metadata=value),
            ):
                assert response.status_code in (200, 201, 400), response.text
                if response.status_code == 400:
                    problem(response, 400, "invalid_request")
        assert api.reply(api.create(), "hello")["status"] == "completed"
        api.close()
