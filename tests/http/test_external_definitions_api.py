"""§2, §8 at the wire: what a context declares as its tools is checked when it is declared."""

from typing import Any

import pytest
from tooling import external
from wire import Api, Json, invalid, ok


def nested(levels: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


WRONG = [
    ([external("a", parameters={"type": "nothing"})], "tools[0].parameters"),
    ([external("a"), external("b", parameters={"required": "x"})], "tools[1].parameters"),
    ([external("a", parameters={"$ref": "http://127.0.0.1:9/x"})], "tools[0].parameters"),
    ([external("a", parameters={"$ref": "#/nowhere"})], "tools[0].parameters"),
    ([external("a", parameters={"properties": {"q": {"pattern": "("}}})], "tools[0].parameters"),
    ([external("a", parameters=nested(60))], "tools[0].parameters"),
    ([external("a"), external("a")], "tools[1]"),
    ([external("a"), "a"], "tools[1]"),
    (["a", "a"], "tools[1]"),
]


@pytest.mark.parametrize(("tools", "field"), WRONG)
def test_a_wrong_declaration_is_named(api: Api, tools: list[Any], field: str) -> None:
    """When the context is made and when it is changed; nothing is made or changed."""
    invalid(api.http.post("/contexts", json={"id": "wrong", "tools": tools}), field)
    assert api.http.get("/contexts/wrong").status_code == 404
    context_id = api.create()
    before = api.context(context_id)
    invalid(api.http.patch(f"/contexts/{context_id}", json={"tools": tools}), field)
    assert api.context(context_id) == before


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"type": "object"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}},
        nested(20),
    ],
)
def test_any_json_schema_may_be_declared(api: Api, parameters: Json) -> None:
    """Of its own draft, with references to its own parts."""
    context_id = api.create(tools=[external("a", parameters=parameters)])
    (tool,) = api.context(context_id)["tools"]
    assert tool["parameters"] == parameters
    patched = ok(api.http.patch(f"/contexts/{context_id}", json={"tools": [tool, external("b")]}))
    assert [one["name"] for one in patched["tools"]] == ["a", "b"]


def test_there_may_be_so_many_tools(api: Api) -> None:
    """Each is checked, and offered with each request."""
    invalid(api.http.post("/contexts", json={"tools": [f"t{n}" for n in range(257)]}), "tools")
    assert len(api.context(api.create(tools=[f"t{n}" for n in range(256)]))["tools"]) == 256
