"""§12 at the wire: the OpenAPI document is complete and true."""

from typing import Any

import jsonschema_rs
import pytest
from wire import PROBLEM_TYPE, Api, Json, ok, script

CONTEXT = "/contexts/{context_id}"
MESSAGE = f"{CONTEXT}/messages/{{message_id}}"
TURN = f"{CONTEXT}/turns/{{turn_id}}"

# Every operation of the protocol so far, its success, and the problems that can be provoked or happen.
OPERATIONS: dict[tuple[str, str], tuple[set[int], set[int]]] = {
    ("/contexts", "post"): ({200, 201}, {400, 403, 409, 413, 415, 503}),
    ("/contexts", "get"): ({200}, {400, 403, 503}),
    (CONTEXT, "get"): ({200}, {400, 403, 404, 503}),
    (CONTEXT, "patch"): ({200}, {400, 403, 404, 413, 415, 503}),
    (CONTEXT, "delete"): ({204}, {400, 403, 404, 503}),
    (f"{CONTEXT}/messages", "post"): ({201, 202}, {400, 403, 404, 409, 413, 415, 429, 503}),
    (f"{CONTEXT}/messages", "get"): ({200}, {400, 403, 404, 503}),
    (MESSAGE, "get"): ({200}, {400, 403, 404, 503}),
    (f"{MESSAGE}/content", "get"): ({200, 304}, {400, 403, 404, 503}),
    (f"{MESSAGE}/content", "head"): ({200, 304}, {400, 403, 404, 503}),
    (f"{MESSAGE}/chunks", "get"): ({200}, {400, 403, 404, 503}),
    (f"{CONTEXT}/stream", "get"): ({200}, {400, 403, 404, 503}),
    (f"{CONTEXT}/turns", "get"): ({200}, {400, 403, 404, 503}),
    (TURN, "get"): ({200}, {400, 403, 404, 503}),
    (f"{TURN}/cancel", "post"): ({200}, {400, 403, 404, 503}),
    (f"{CONTEXT}/cancel", "post"): ({200}, {400, 403, 404, 413, 415, 503}),
    (f"{CONTEXT}/retry", "post"): ({202}, {400, 403, 404, 409, 413, 415, 503}),
    (f"{TURN}/retry", "post"): ({202}, {400, 403, 404, 409, 413, 415, 429, 503}),
    (f"{CONTEXT}/transitions", "get"): ({200}, {400, 403, 404, 503}),
    ("/machine", "get"): ({200}, {400, 403, 503}),
    ("/health/live", "get"): ({200}, {400, 403, 503}),
    ("/health/ready", "get"): ({200}, {400, 403, 503}),
    ("/metrics", "get"): ({200}, {400, 403, 503}),
    ("/schema/openapi.json", "get"): ({200}, {400, 403, 503}),
}


@pytest.fixture(scope="module")
def document(api: Api) -> Json:
    """What the server says of itself."""
    return ok(api.http.get("/schema/openapi.json"))


def operation(document: Json, path: str, method: str) -> Json:
    found: Json = document["paths"][path][method]
    return found


def schema(document: Json, path: str, method: str, status: int, type_: str) -> Json:
    """The schema of an answer, with the document's components, for a validator."""
    content = operation(document, path, method)["responses"][str(status)]["content"]
    return {**content[type_]["schema"], "components": document["components"]}


def test_every_operation_is_described(document: Json) -> None:
    """By its path, its method, a sentence, and an id of its own."""
    assert document["openapi"].startswith("3.")
    assert document["info"]["title"] == "contextd"
    ids = set()
    for path, method in OPERATIONS:
        described = operation(document, path, method)
        assert described.get("summary") or described.get("description"), (path, method)
        ids.add(described["operationId"])
    assert len(ids) == len(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), list(OPERATIONS))
def test_every_operation_names_its_answers_and_problems(
    document: Json, path: str, method: str
) -> None:
    """Every status that a client can meet, problems as application/problem+json."""
    success, problems = OPERATIONS[path, method]
    responses = operation(document, path, method)["responses"]
    assert success | problems <= {int(status) for status in responses}, sorted(responses)
    for status in responses:
        if int(status) >= 400:
            assert set(responses[status]["content"]) == {PROBLEM_TYPE}


def test_parameters_are_described_with_their_ranges(document: Json) -> None:
    """Names and bounds as the protocol has them."""
    wanted = {
        ("/contexts", "get"): {"state", "limit", "cursor"},
        (f"{CONTEXT}/messages", "get"): {
            "branch", "cursor", "limit", "include", "since_revision",
        },
        (f"{MESSAGE}/content", "get"): {"from_sequence", "to_sequence", "wait"},
        (f"{MESSAGE}/chunks", "get"): {"from_sequence", "limit"},
        (f"{CONTEXT}/stream", "get"): {"throttle_ms", "heartbeat", "framing", "last_event_id"},
        (f"{CONTEXT}/turns", "get"): {"limit", "cursor"},
        (f"{CONTEXT}/transitions", "get"): {"limit", "cursor"},
        (CONTEXT, "get"): set(),
    }  # fmt: skip
    for (path, method), names in wanted.items():
        found = operation(document, path, method).get("parameters", [])
        assert {entry["name"] for entry in found if entry["in"] == "query"} == names, path
        in_path = {entry["name"] for entry in found if entry["in"] == "path"}
        assert in_path == {part.strip("{}") for part in path.split("/") if part.startswith("{")}
    wait = next(
        entry
        for entry in operation(document, f"{MESSAGE}/content", "get")["parameters"]
        if entry["name"] == "wait"
    )
    assert (wait["schema"]["minimum"], wait["schema"]["maximum"]) == (0, 30)
    assert wait["required"] is False


def test_forms_are_described(document: Json) -> None:
    """Bare text, the stream, the diagram and the figures have their own media types."""
    for path, types in (
        (f"{MESSAGE}/content", {"application/json", "text/plain"}),
        (f"{CONTEXT}/stream", {"text/event-stream"}),
        ("/machine", {"application/json", "text/vnd.mermaid"}),
    ):
        assert set(operation(document, path, "get")["responses"]["200"]["content"]) == types, path


def test_answers_are_as_described(api: Api, document: Json, context_id: str) -> None:
    """Real answers of every route validate against their schemas."""
    answer, _ = api.run(context_id, script({"thinking": "a"}, {"text": "b"}, {"error": "fatal"}))
    api.send(context_id, "note", respond=False)
    message = api.messages(context_id)[1]["id"]
    root = f"/contexts/{context_id}"
    for path, url in (
        ("/contexts", "/contexts"),
        (CONTEXT, root),
        (f"{CONTEXT}/messages", f"{root}/messages?include=content"),
        (MESSAGE, f"{root}/messages/{message}"),
        (f"{MESSAGE}/content", f"{root}/messages/{message}/content"),
        (f"{MESSAGE}/content", f"{root}/messages/{message}/content?to_sequence=1"),
        (f"{MESSAGE}/chunks", f"{root}/messages/{message}/chunks"),
        (f"{CONTEXT}/turns", f"{root}/turns"),
        (TURN, f"{root}/turns/{answer['turn_id']}"),
        (f"{CONTEXT}/transitions", f"{root}/transitions"),
        ("/machine", "/machine"),
        ("/health/live", "/health/live"),
    ):
        body = ok(api.http.get(url))
        validate(body, schema(document, path, "get", 200, "application/json"), url)
    for path, url in (
        (CONTEXT, "/contexts/nothing"),
        (f"{CONTEXT}/messages", f"{root}/messages?limit=0"),
    ):
        response = api.http.get(url)
        problem_schema = schema(document, path, "get", response.status_code, PROBLEM_TYPE)
        validate(response.json(), problem_schema, url)


def test_requests_are_described(document: Json) -> None:
    """A body for each operation that takes one, of JSON; a patch may say that it is a merge patch."""
    for path, method in (
        ("/contexts", "post"),
        (CONTEXT, "patch"),
        (f"{CONTEXT}/messages", "post"),
        (f"{CONTEXT}/cancel", "post"),
    ):
        content = operation(document, path, method)["requestBody"]["content"]
        assert "application/json" in content
    send = operation(document, f"{CONTEXT}/messages", "post")["requestBody"]["content"]
    wanted = {**send["application/json"]["schema"], "components": document["components"]}
    validate({"payload": {"type": "text", "content": "x"}}, wanted, "send")
    with pytest.raises(jsonschema_rs.ValidationError):
        validate({"payload": {"type": "text", "content": ""}}, wanted, "send")
    with pytest.raises(jsonschema_rs.ValidationError):
        validate({"payload": {"type": "text", "content": "x"}, "colour": 1}, wanted, "send")


def validate(value: Any, against: Json, what: str) -> None:
    """Raises `ValidationError` where the value is not as described; `what` shows in the trace."""
    assert what
    jsonschema_rs.Draft202012Validator(against).validate(value)
