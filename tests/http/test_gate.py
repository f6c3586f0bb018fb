"""§11 and the CORS of §3.3 at the wire: which hosts and which origins are answered."""

import pytest
from wire import Api, ok, problem

LOOPBACK_ORIGINS = [
    "http://localhost",
    "http://localhost:3000",
    "https://localhost:8443",
    "http://127.0.0.1:5173",
    "http://[::1]:8080",
]
FOREIGN_ORIGINS = [
    "http://evil.example",
    "https://localhost.evil.example",
    "http://evil.example:3000",
    "http://127.0.0.1.evil.example",
    "http://localhost@evil.example",
    "http://notlocalhost",
    "null",
    "",
    "file://",
    "http://localhost:3000/path",
    "http://localhost:3000, http://evil.example",
]
EXPOSED = {
    "contextd-sequence", "contextd-head-sequence", "contextd-status", "contextd-final", "etag",
    "retry-after", "location",
}  # fmt: skip


def names(value: str) -> set[str]:
    return {part.strip().lower() for part in value.split(",")}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8600", "[::1]:80"]
)
def test_its_own_host_names_are_answered(api: Api, host: str) -> None:
    """Loopback by each of its names, with and without a port."""
    assert api.http.get("/health/live", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8600",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "localhost@evil.example",
        "localhost:80:evil",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/contexts", "/health/live", "/contexts/x/stream", "/nothing"])
def test_another_host_name_is_forbidden(api: Api, host: str, path: str) -> None:
    """403 before anything else: a page that points its own name at loopback gets nothing."""
    problem(api.http.get(path, headers={"host": host}), 403, "forbidden")


@pytest.mark.parametrize("origin", LOOPBACK_ORIGINS)
def test_pages_on_loopback_may_read(api: Api, context_id: str, origin: str) -> None:
    """Access-Control-Allow-Origin is the origin, and our headers are exposed."""
    message = api.send(context_id, "x", respond=False)["message_id"]
    for path in (
        "/contexts",
        f"/contexts/{context_id}/messages/{message}/content",
        "/nothing",
        "/health/live",
    ):
        response = api.http.get(path, headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == origin
        assert names(response.headers["access-control-expose-headers"]) >= EXPOSED
        assert "origin" in names(response.headers["vary"])
    response = api.http.post("/contexts", json={}, headers={"origin": origin})
    ok(response, 201)
    assert response.headers["access-control-allow-origin"] == origin


def test_streams_and_304_are_shared_too(api: Api, context_id: str) -> None:
    """EventSource across origins, and a revalidation by a browser."""
    origin = LOOPBACK_ORIGINS[0]
    with api.stream(context_id, headers={"origin": origin}) as stream:
        assert stream.headers["access-control-allow-origin"] == origin
        stream.current()
    message = api.send(context_id, "x", respond=False)["message_id"]
    etag = api.get_content(context_id, message).headers["etag"]
    headers = {"origin": origin, "if-none-match": etag}
    response = api.get_content(context_id, message, headers=headers)
    assert response.status_code == 304
    assert response.headers["access-control-allow-origin"] == origin
    assert names(response.headers["vary"]) >= {"accept", "origin", "authorization"}


def test_without_an_origin_the_answer_still_varies_on_it(api: Api, context_id: str) -> None:
    """A cache must not give a browser the answer that was made for another client (§3.3)."""
    message = api.send(context_id, "x", respond=False)["message_id"]
    response = api.get_content(context_id, message)
    assert "access-control-allow-origin" not in response.headers
    assert "origin" in names(response.headers["vary"])


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_pages_elsewhere_are_forbidden(api: Api, context_id: str, origin: str) -> None:
    """403 for reading and writing, and no permission in the answer; nothing was done."""
    before = api.context(context_id)
    for method, path, body in (
        ("GET", "/contexts", None),
        ("GET", f"/contexts/{context_id}/stream", None),
        ("PATCH", f"/contexts/{context_id}", {"title": "x"}),
        ("DELETE", f"/contexts/{context_id}", None),
    ):
        response = api.http.request(method, path, json=body, headers={"origin": origin})
        problem(response, 403, "forbidden")
        assert "access-control-allow-origin" not in response.headers
    assert api.context(context_id) == before


@pytest.mark.parametrize(
    "path", ["/contexts", "/contexts/x/messages/m/content", "/contexts/x/stream"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_preflight_is_answered(api: Api, path: str, method: str) -> None:
    """What a browser asks before it sends: this method and these headers from this origin."""
    origin = "http://localhost:3000"
    response = api.http.options(
        path,
        headers={
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": "content-type, last-event-id, if-none-match",
        },
    )
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == origin
    assert method.lower() in names(response.headers["access-control-allow-methods"])
    assert names(response.headers["access-control-allow-headers"]) >= {
        "content-type", "last-event-id", "if-none-match",
    }  # fmt: skip
    assert "origin" in names(response.headers["vary"])


def test_a_preflight_from_elsewhere_is_forbidden(api: Api) -> None:
    """403, and nothing is allowed."""
    response = api.http.options(
        "/contexts",
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    problem(response, 403, "forbidden")
    assert "access-control-allow-origin" not in response.headers


def test_hosts_and_origins_are_settings(named: Api) -> None:
    """What the operator names is answered; the rest is not."""
    for host in ("chat.example", "other.example:443", "localhost"):
        assert named.http.get("/health/live", headers={"host": host}).status_code == 200
    problem(named.http.get("/health/live", headers={"host": "evil.example"}), 403, "forbidden")
    response = named.http.get("/health/live", headers={"origin": "https://chat.example"})
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    for origin in (
        "http://chat.example",
        "https://chat.example.evil.example",
        "https://chatxexample",
    ):
        problem(named.http.get("/health/live", headers={"origin": origin}), 403, "forbidden")
