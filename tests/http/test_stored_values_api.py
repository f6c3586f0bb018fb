"""One stored value costs nobody more than itself (§2): sums that are too large, JSON that cannot be read."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from serving import Server
from sqlalchemy import text
from wire import Api, Json, ok, script

from contextd.store.engines import make_engines

MAX = 2**53 - 1
ODD_VALUES = ["null", "7", '"odd"', "[1]", '{"x": [{}]}', "{", "", '"\\ud800"', "[" * 3000]
COLUMNS = {
    "contexts": ["state_detail", "tools", "approval_policy", "metadata", "usage"],
    "messages": ["usage", "error", "metadata", "client_metadata", "stats"],
    "turns": ["phases", "usage", "error", "left_out"],
    "tool_calls": ["arguments"],
    "journal": ["detail"],
}
JSON = {"Content-Type": "application/json"}
SEND = '{"payload": {"type": "text", "content": "a"}, "client_metadata": %s}'
LISTS = ["messages", "turns", "tool-calls", "transitions", "branches"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def stored_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of either kind for all tests of this file."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('stored')}/contextd.db"
    return str(request.getfixturevalue("make_postgresql_url")())


@pytest.fixture(scope="module")
def own_server(stored_url: str) -> Iterator[Server]:
    """A server on a database that the tests write to as well."""
    with Server(stored_url, settings={"scripted_rate": 0, "backoff_initial_s": 0}) as server:
        yield server


@pytest.fixture(scope="module")
def own(own_server: Server) -> Iterator[Api]:
    """A client of it."""
    client = Api(own_server.url)
    yield client
    client.close()


def write(stored_url: str, statement: str, **values: object) -> None:
    async def run() -> None:
        engines = make_engines(stored_url, readers=1)
        async with engines.writer.begin() as connection:
            await connection.execute(text(statement), values)
        await engines.dispose()

    asyncio.run(run())


def spending(*prompts: int) -> str:
    steps = [{"usage": {"prompt_tokens": n, "completion_tokens": 1}} for n in prompts]
    return script({"text": "a"}, *steps)


def test_sums_of_tokens_end_at_what_a_client_can_hold(own: Api) -> None:
    """Over the reports of an answer, the attempts of a turn and the turns of a context (§6)."""
    own.create(id="innocent")
    own.create(id="spent")
    _, turn = own.run("spent", spending(MAX, MAX))
    assert turn["usage"] == {"prompt_tokens": MAX, "completion_tokens": 2}
    _, turn = own.run(
        "spent",
        script(
            {"usage": {"prompt_tokens": MAX, "completion_tokens": MAX}},
            {"tool_call": {"name": "missing", "arguments": {}}},
            {"usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        ),
    )
    assert turn["usage"]["prompt_tokens"] == MAX
    own.run("spent", spending(1))
    listed = {item["id"]: item for item in own.walk("/contexts")}
    assert listed["spent"]["usage"] == {"prompt_tokens": MAX, "completion_tokens": MAX}
    assert "usage" not in listed["innocent"]
    assert own.context("spent") == listed["spent"]


def test_a_producers_odd_count_is_refused(api: Api, context_id: str) -> None:
    """A client of ours can be told (§7)."""
    path = f"/contexts/{context_id}/messages/m"
    ok(api.http.put(path, json={"producer": {"id": "w"}}), 201)
    for count in ["-1", "1.5", '"7"', "true", "1e400", "[1]", "null", str(2**53), str(10**30)]:
        body = f'{{"epoch": 1, "usage": {{"prompt_tokens": {count}}}}}'
        answer = api.http.post(f"{path}/complete", content=body, headers=JSON)
        assert answer.status_code == 400, (count, answer.text)
    assert api.message(context_id, "m")["status"] == "streaming"


def test_what_cannot_be_read_is_left_out_of_every_answer(
    own: Api, own_server: Server, stored_url: str
) -> None:
    """Whatever stands in a column of JSON: lists, single reads, streams, sends and changes go on (§2)."""
    own.create(id="whole")
    for number, value in enumerate(ODD_VALUES):
        name = f"c{number}"
        own.create(id=name)
        own.run(name, script({"tool_call": {"name": "missing", "arguments": {"a": 1}}}))
        for table, columns in COLUMNS.items():
            key = "key" if table == "contexts" else "context_key"
            which = f"{key} = (SELECT key FROM contexts WHERE id = :id)"
            to = ", ".join(f"{column} = :value" for column in columns)
            write(stored_url, f"UPDATE {table} SET {to} WHERE {which}", value=value, id=name)
        look_at(own, name)
        ok(own.http.patch(f"/contexts/{name}", json={"title": "t", "metadata": {"a": 1}}))
        ok(own.http.patch(f"/contexts/{name}", json={"approval_policy": {"max_depth": 1}}))
        _, turn = own.run(name, spending(2))
        assert turn["status"] == "completed", (value, turn)
        assert turn["usage"] == {"prompt_tokens": 2, "completion_tokens": 1}
        look_at(own, name)
    names = {item["id"] for item in own.walk("/contexts")}
    assert names >= {"whole", *(f"c{number}" for number in range(len(ODD_VALUES)))}
    assert "[[[" not in own_server.log
    assert "odd" not in own_server.log
    told = [line for line in own_server.log.splitlines() if "cannot be read" in line]
    assert len([line for line in told if "approval_policy" in line and "c4" in line]) == 1
    assert "Traceback" not in own_server.log


def look_at(api: Api, context_id: str) -> None:
    """Everything that shows the context."""
    shown = api.context(context_id)
    assert shown in api.walk("/contexts")
    for name in LISTS:
        assert api.walk(f"/contexts/{context_id}/{name}")
    for message in api.messages(context_id):
        single = api.message(context_id, message["id"])
        assert single == message
        assert isinstance(single["metadata"], dict)
    for turn in api.walk(f"/contexts/{context_id}/turns"):
        assert api.turn(context_id, turn["id"]) == turn
    assert api.page(context_id, since_revision=0, include="content")["items"]
    assert api.attach(context_id)
    assert api.attach(context_id, last_event_id=shown["stream_cursor"])


def test_what_is_left_of_a_value_is_shown(own: Api, stored_url: str) -> None:
    """Of counts each that is one; of tools those that are some; of a policy nothing: the strictest."""
    own.create(id="left", metadata={"kept": True})
    own.run("left", spending(3))
    write(
        stored_url,
        "UPDATE contexts SET usage = :usage, tools = :tools, approval_policy = :policy"
        " WHERE id = 'left'",
        usage=json.dumps({"prompt_tokens": 2**60, "completion_tokens": 5}),
        tools=json.dumps(["good", 7, {"name": "half"}]),
        policy=json.dumps({"mode": "auto", "allow": "everything"}),
    )
    context: Json = own.context("left")
    assert context["usage"] == {"prompt_tokens": MAX, "completion_tokens": 5}
    assert context["tools"] == ["good"]
    assert context["approval_policy"]["mode"] == "manual"
    assert context["approval_policy"]["allow"] == []
    assert context["metadata"] == {"kept": True}


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_what_is_nested_too_deeply_is_refused(
    api: Api, context_id: str, opening: str, closing: str
) -> None:
    """Never is there a depth that can be stored and not be read (§1)."""
    where = f"/contexts/{context_id}"
    for levels in [250, 966, 968, 972, 5000]:
        nested = '{"a": %s}' % (opening * levels + "1" + closing * levels)
        for method, path, body in (
            ("POST", "/contexts", '{"metadata": %s}'),
            ("PATCH", where, '{"metadata": %s}'),
            ("POST", f"{where}/messages", SEND),
            ("PUT", f"{where}/messages/x", '{"producer": {"id": "w"}, "metadata": %s}'),
        ):
            answer = api.http.request(method, path, content=body % nested, headers=JSON)
            assert answer.status_code == 400, (method, path, answer.text[:200])
