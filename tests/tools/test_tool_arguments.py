"""Arguments are checked before anything runs, and no schema or text can hold up the server (§8)."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from contextd.core.values import JsonObject
from contextd.tools.arguments import (
    DEPTH_MAX,
    SCHEMA_BYTES_MAX,
    ArgumentChecker,
)

CPU_S = 0.2

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "unit": {"enum": ["c", "f"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker() -> AsyncIterator[ArgumentChecker]:
    """One for all: starting its process takes longer than a check."""
    made = ArgumentChecker(cpu_s=CPU_S)
    yield made
    await made.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


def nested(levels: int, inside: Any = 1) -> JsonObject:
    value: Any = inside
    for _ in range(levels):
        value = {"a": value}
    return value  # type: ignore[no-any-return]


async def test_arguments_that_fit_have_no_errors(checker: ArgumentChecker) -> None:
    """In the checker's words: an empty list."""
    assert await checker.check(WEATHER, {"city": "Rome", "days": [1, 2], "unit": "c"}) == []
    assert await checker.check({}, {"any": [None, 10**400, 1.5]}) == []


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        ({}, ['"city" is a required property']),
        ({"city": 3}, ['/city: value is not of type "string"']),
        (
            {"city": "Rome", "days": [1, "two", None]},
            [
                '/days/1: value is not of type "integer"',
                '/days/2: value is not of type "integer"',
            ],
        ),
        ({"city": "Rome", "unit": "k"}, ['/unit: value is not one of "c" or "f"']),
        (
            {"city": "Rome", "more": 1},
            ["Additional properties are not allowed ('more' was unexpected)"],
        ),
        (
            {"city": "Rome", "note": 1},
            [
                "/note: value is not valid under any of the schemas listed in the 'anyOf' keyword "
                '(value is not of type "string"; value is not of type "null")'
            ],
        ),
    ],
)
async def test_errors_say_where_and_what(
    checker: ArgumentChecker, arguments: JsonObject, errors: list[str]
) -> None:
    """All of them at once, so that a model can put them right at once."""
    assert await checker.check(WEATHER, arguments) == errors


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": ["x" * 100_000]},
        {"city": 1, "x" * 100_000: 2},
        {f"{'k' * 300}{number}": number for number in range(100)},
        {"days": ["x"] * 5_000},
        {"days": ["x"] * 100_000},
        {"city": "a", "a\nb\r\u2028": 1},
    ],
)
async def test_errors_are_few_and_short(checker: ArgumentChecker, arguments: JsonObject) -> None:
    """Whatever was given, what the model gets is bounded, a line each, and repeats no value."""
    errors = await checker.check(WEATHER, arguments)
    assert 1 <= len(errors) <= 11
    assert all(len(error) <= 300 and len(error.splitlines()) == 1 for error in errors)
    assert not any("xxxxxxxxxx" in error and "value" in error for error in errors)


async def test_more_errors_than_are_shown_are_counted(checker: ArgumentChecker) -> None:
    """Ten, and how many more there are."""
    errors = await checker.check(WEATHER, {"city": "", "days": ["x"] * 25})
    assert len(errors) == 11
    assert errors[-1] == "and 15 more"


async def test_of_large_arguments_only_the_first_error_is_told(checker: ArgumentChecker) -> None:
    """A hundred thousand of them would take longer than a check may."""
    errors = await checker.check(WEATHER, {"city": "", "days": ["x"] * 100_000})
    assert errors == ['/days/0: value is not of type "integer"']


def exponential() -> JsonObject:
    """Two to the power of sixty steps, in a few lines."""
    steps: JsonObject = {"s0": {"type": "object"}}
    for number in range(60):
        steps[f"s{number + 1}"] = {"allOf": [{"$ref": f"#/$defs/s{number}"}] * 2}
    return {"$defs": steps, "$ref": "#/$defs/s60"}


def branching() -> JsonObject:
    """Twice the steps for each level of the arguments."""
    inner = {"properties": {"a": {"$ref": "#/$defs/t"}}}
    any_of = [{**inner, "required": ["x"]}, {**inner, "required": ["y"]}]
    return {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": any_of}}}


UNCHECKED = [
    "the arguments could not be checked against the tool's JSON Schema in the time there is"
]


@pytest.mark.parametrize(
    ("schema", "arguments"), [(exponential(), {}), (branching(), nested(DEPTH_MAX - 1))]
)
async def test_a_check_that_would_never_end_is_ended_and_the_loop_goes_on(
    checker: ArgumentChecker, schema: JsonObject, arguments: JsonObject
) -> None:
    """The server works meanwhile, such arguments count as wrong, and the next check is as before."""
    check = asyncio.create_task(checker.check(schema, arguments))
    turns = 0
    while not check.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert await check == UNCHECKED
    assert turns > 10
    assert await checker.check(WEATHER, {"city": "Rome"}) == []


@pytest.mark.parametrize(
    "pattern", ["^(a+)+$", "^(a|aa)+$", "^(a|a?)+$", "(?=a)^(a*)*b?$", "(a*)*\\1$"]
)
async def test_no_pattern_holds_up_the_server(checker: ArgumentChecker, pattern: str) -> None:
    """It is answered, fitting or not: a pattern may give up, and never takes more than its time."""
    schema = {"properties": {"a": {"pattern": pattern}}}
    assert await checker.check(schema, {"a": "a" * 5_000 + "!"}) != []


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
async def test_a_schema_that_refers_to_itself_is_answered(
    checker: ArgumentChecker, schema: JsonObject
) -> None:
    """One that goes in circles says nothing, so anything fits it."""
    assert await checker.check(schema, {"a": 1}) == []


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "wrong"}, "is wrong: /type: value is not valid"),
        ({"properties": []}, 'is wrong: /properties: value is not of type "object"'),
        ({"properties": {"a": {"pattern": "("}}}, "regex"),
        ({"$ref": "#/$defs/none"}, "'/$defs/none' does not exist"),
        ({"$schema": "http://example.invalid/draft"}, "Unknown meta-schema"),
        (nested(DEPTH_MAX + 1), "nested more than 64 levels"),
        (nested(100_000), "nested more than 64 levels"),
        ({"description": "x" * SCHEMA_BYTES_MAX}, "larger than 262144 bytes"),
        ({"const": float("nan")}, "not finite"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        ({"const": b"x"}, "of type bytes, which is not JSON"),
    ],
)
async def test_a_wrong_schema_is_said_to_be_wrong(
    checker: ArgumentChecker, schema: JsonObject, says: str
) -> None:
    """To whoever declares the tool, and to a model that calls it all the same."""
    for errors in (await checker.check_schema(schema), await checker.check(schema, {})):
        assert len(errors) == 1
        assert errors[0].startswith(
            ("the tool's JSON Schema ", "the values of the tool's JSON Schema ")
        )
        assert says in errors[0]


async def test_a_right_schema_has_no_errors(checker: ArgumentChecker) -> None:
    """Older drafts are known by their names."""
    assert await checker.check_schema(WEATHER) == []
    assert await checker.check_schema({"$schema": "http://json-schema.org/draft-07/schema#"}) == []


async def test_nothing_is_ever_fetched(checker: ArgumentChecker) -> None:
    """A reference to elsewhere is an error, and nobody is asked for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for reference in (url, "file:///etc/passwd", "other.json"):
            (error,) = await checker.check({"$ref": reference}, {})
            assert f"'{reference}' is not present" in error
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (nested(DEPTH_MAX + 1), "nested more than 64 levels"),
        (nested(100_000), "nested more than 64 levels"),
        ({"a": "x\x00"}, "U+0000"),
        ({"x\x00": 1}, "U+0000"),
        ({"a": [float("inf")]}, "not finite"),
    ],
)
async def test_arguments_that_came_another_way_are_checked_as_well(
    checker: ArgumentChecker, arguments: JsonObject, says: str
) -> None:
    """A person who approves a call may change them, so they did not all go through `parse`."""
    (error,) = await checker.check({}, arguments)
    assert says in error


async def test_checks_at_once_get_each_their_own_answer(checker: ArgumentChecker) -> None:
    """They take turns, and one that is cancelled in the middle spoils no other's."""
    checks = [
        asyncio.create_task(checker.check({"required": [f"r{number}"]}, {})) for number in range(40)
    ]
    await asyncio.sleep(0)
    checks[0].cancel()
    checks[7].cancel()
    results = await asyncio.gather(*checks, return_exceptions=True)
    for number, result in enumerate(results):
        if number in {0, 7}:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert result == [f'"r{number}" is a required property']


async def test_a_checker_that_was_closed_starts_anew() -> None:
    """Closing ends the process; closing twice, or before the first check, is harmless."""
    checker = ArgumentChecker(cpu_s=CPU_S)
    await checker.close()
    assert await checker.check({}, {}) == []
    worker = checker._worker
    assert worker is not None
    await checker.close()
    assert worker.returncode is not None
    assert await checker.check({}, {}) == []
    await checker.close()
    await checker.close()


async def test_a_process_that_was_killed_is_replaced() -> None:
    """Somebody else may end it; then the check after it is as good as ever."""
    checker = ArgumentChecker(cpu_s=CPU_S)
    assert await checker.check({}, {}) == []
    worker = checker._worker
    assert worker is not None
    worker.kill()
    await worker.wait()
    assert await checker.check({}, {}) == []
    await checker.close()
