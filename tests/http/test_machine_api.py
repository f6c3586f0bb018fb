"""§5 at the wire: the machine and the journal."""

from itertools import pairwise

import pytest
from protocol_table import STATES, TABLE, TRANSITIONS
from wire import TIMESTAMP, Api, invalid, ok

ENTRY_FIELDS = {
    "revision", "turn_id", "trigger", "from_state", "to_state", "at", "duration_ms", "detail",
}  # fmt: skip

# The machine


def test_the_machine_is_the_table_of_the_protocol(api: Api) -> None:
    """States, triggers and every transition, and none besides."""
    machine = ok(api.http.get("/machine"))
    assert set(machine) == {"states", "triggers", "transitions"}
    assert set(machine["states"]) == STATES
    assert len(machine["states"]) == len(STATES)
    assert set(machine["triggers"]) == set(TABLE)
    for row in machine["transitions"]:
        assert set(row) == {"trigger", "from_state", "to_state"}
    rows = [(r["trigger"], r["from_state"], r["to_state"]) for r in machine["transitions"]]
    assert len(rows) == len(set(rows))
    assert set(rows) == TRANSITIONS


def test_the_machine_as_a_diagram(api: Api) -> None:
    """`Accept: text/vnd.mermaid` gives a state diagram that names every state and trigger."""
    response = api.http.get("/machine", headers={"accept": "text/vnd.mermaid"})
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == "text/vnd.mermaid"
    assert "stateDiagram" in response.text
    for name in STATES | set(TABLE):
        assert name in response.text
    assert "accept" in response.headers["vary"].lower()
    ok(api.http.get("/machine", headers={"accept": "application/json, text/vnd.mermaid;q=0.5"}))


# The journal


def test_the_journal_of_a_plain_turn(api: Api, context_id: str) -> None:
    """Five steps, oldest first, each its own revision, each allowed by the table."""
    answer, _ = api.run(context_id, "hello")
    journal = api.journal(context_id)
    assert [entry["trigger"] for entry in journal] == [
        "receive_message", "request_llm", "first_chunk", "end_stream", "finish",
    ]  # fmt: skip
    for entry in journal:
        assert set(entry) == ENTRY_FIELDS
        assert (entry["trigger"], entry["from_state"], entry["to_state"]) in TRANSITIONS
        assert entry["turn_id"] == answer["turn_id"]
        assert TIMESTAMP.fullmatch(entry["at"])
        assert entry["duration_ms"] >= 0
        assert isinstance(entry["detail"], dict)
    for before, after in pairwise(journal):
        assert after["revision"] == before["revision"] + 1
        assert after["from_state"] == before["to_state"]
    assert journal[0]["revision"] == answer["revision"]
    assert journal[-1]["revision"] == api.context(context_id)["revision"]
    path = f"/contexts/{context_id}/transitions"
    assert api.walk(path, limit=2) == api.walk(path, limit=5) == journal


@pytest.mark.parametrize("list_", ["transitions", "turns"])
@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("cursor=garbage", "cursor"), ("a=1", "a")],
)
def test_a_wrong_parameter_of_these_lists_is_named(
    api: Api, context_id: str, list_: str, query: str, field: str
) -> None:
    """400 with its name."""
    invalid(api.http.get(f"/contexts/{context_id}/{list_}?{query}"), field)
