"""A Python function becomes a tool: its signature the schema, its docstring the words (§8)."""

import asyncio
import dataclasses
import enum
import threading
from collections.abc import Awaitable, Callable
from datetime import date
from typing import Annotated, Any, Literal

import msgspec
import pytest

from contextd.tools import Tool, ToolError, tool, tool_of


class Unit(enum.Enum):
    """A unit."""

    CELSIUS = "c"
    FAHRENHEIT = "f"


class Place(msgspec.Struct):
    """A place on earth."""

    city: str
    country: str = "DE"


@dataclasses.dataclass
class Span:
    """Two numbers."""

    start: int
    end: int


def made(function: Callable[..., Any]) -> Tool:
    found = tool_of(function)
    assert found is not None
    return found


def properties(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(made(tool(function)).parameters["properties"])


def test_a_bare_decorator_takes_name_words_and_schema_from_the_function() -> None:
    """The whole schema, exactly: nothing but what was declared is allowed."""

    @tool
    def add(first: int, second: int = 3) -> int:
        """Adds two numbers.

        It never overflows.

        Args:
            first: The one
                number.
            second (int): The other: any.
        """
        return first + second

    assert made(add) == Tool(
        name="add",
        description="Adds two numbers.\n\nIt never overflows.",
        parameters={
            "type": "object",
            "properties": {
                "first": {"type": "integer", "description": "The one number."},
                "second": {"type": "integer", "description": "The other: any.", "default": 3},
            },
            "required": ["first"],
            "additionalProperties": False,
        },
        run=made(add).run,
    )
    assert add(1, 2) == 3, "it can still be called as a function"


def test_options_are_taken_over() -> None:
    """Each option is on the tool, and words given there go before the docstring's."""

    @tool(name="a.b:c-1", description="Mine.", read_only=True, idempotent=True)
    def one() -> None:
        """Not these."""

    @tool(requires_approval=True)
    def two() -> None: ...

    assert (made(one).name, made(one).description) == ("a.b:c-1", "Mine.")
    assert (made(one).read_only, made(one).idempotent, made(one).requires_approval) == (1, 1, 0)
    assert (made(two).read_only, made(two).idempotent, made(two).requires_approval) == (0, 0, 1)
    assert made(two).description == ""


def test_sphinx_docstrings_describe_parameters_too() -> None:
    """`:param name:`, with or without a type."""

    def send(to: str, times: int) -> None:
        """Sends it.

        :param to: Who gets it.
        :param int times: How often.
        """

    assert properties(send)["to"]["description"] == "Who gets it."
    assert properties(send)["times"]["description"] == "How often."


def test_an_annotation_s_own_words_and_bounds_stay() -> None:
    """The docstring adds words where the annotation has none, and replaces none."""

    def wait(
        own: Annotated[int, msgspec.Meta(ge=1, description="Mine.")],
        bound: Annotated[int, msgspec.Meta(ge=2)],
        maybe: int | None = None,
    ) -> None:
        """Waits.

        Args:
            own: Not this.
            bound: This.
            maybe: That.
        """

    assert properties(wait) == {
        "own": {"type": "integer", "minimum": 1, "description": "Mine."},
        "bound": {"type": "integer", "minimum": 2, "description": "This."},
        "maybe": {
            "anyOf": [{"type": "integer"}, {"type": "null"}],
            "description": "That.",
            "default": None,
        },
    }


def test_types_become_schemas() -> None:
    """Optional, Literal, Enum, containers, Structs and dataclasses; without annotation anything."""

    def everything(
        free,  # type: ignore[no-untyped-def]
        word: Literal["a", "b"],
        unit: Unit,
        place: Place,
        spans: list[Span],
        counts: dict[str, int],
        maybe: str | None = None,
        sloppy: int = None,  # type: ignore[assignment] # noqa: RUF013
        odd: Any = object(),  # noqa: B008
        tags: list[str] = ["x"],  # noqa: B006
    ) -> None: ...

    schema = made(tool(everything)).parameters
    found = schema["properties"]
    assert found["free"] == {}
    assert found["word"] == {"enum": ["a", "b"]}
    assert found["unit"] == {"$ref": "#/$defs/Unit"}
    assert found["spans"] == {"type": "array", "items": {"$ref": "#/$defs/Span"}}
    assert found["counts"]["additionalProperties"] == {"type": "integer"}
    assert found["maybe"] == {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    assert found["sloppy"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert "default" not in found["odd"]
    assert found["tags"]["default"] == ["x"]
    assert schema["$defs"]["Place"]["required"] == ["city"]
    assert set(schema["$defs"]) == {"Unit", "Place", "Span"}
    assert schema["required"] == ["free", "word", "unit", "place", "spans", "counts"]


async def test_arguments_are_converted_to_the_annotated_types() -> None:
    """Structs, dataclasses, enums and dates arrive as such; what is not given is Python's default."""
    marker = object()
    got: list[Any] = []

    @tool
    def take(
        place: Place, span: Span, unit: Unit, day: date, ratio: float, other: Any = marker
    ) -> None:
        got.extend([place, span, unit, day, ratio, other])

    given = {
        "place": {"city": "Rome"},
        "span": {"start": 1, "end": 2},
        "unit": "f",
        "day": "2026-02-28",
        "ratio": 1,
    }
    await made(take).run(given)
    assert got == [Place("Rome"), Span(1, 2), Unit.FAHRENHEIT, date(2026, 2, 28), 1.0, marker]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"day": "2026-02-30"}, "day"),
        ({"day": 3}, "day"),
        ({}, "day"),
        ({"day": "2026-02-28", "more": 1}, "more"),
    ],
)
async def test_what_the_schema_could_not_say_goes_back_to_the_model(
    given: dict[str, Any], says: str
) -> None:
    """A date that is none fits the schema. The function is not called."""
    called: list[date] = []

    @tool
    def on(day: date) -> None:
        called.append(day)

    with pytest.raises(ToolError, match=says):
        await made(on).run(given)
    assert called == []


async def test_async_functions_run_in_the_loop_and_others_in_a_thread() -> None:
    """So that a function that blocks does not hold up anybody else."""

    @tool
    async def here() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    @tool
    def there() -> int:
        return threading.get_ident()

    assert await made(here).run({}) == threading.get_ident()
    assert await made(there).run({}) != threading.get_ident()


async def test_a_function_that_returns_an_awaitable_is_awaited() -> None:
    """Such as a wrapper around an async function."""

    async def inner() -> str:
        return "done"

    @tool
    def outer() -> Awaitable[str]:
        return inner()

    assert await made(outer).run({}) == "done"


def no_annotation(x: "Missing") -> None: ...  # type: ignore[name-defined] # noqa: F821


def stars(*names: str) -> None: ...


def double_stars(**names: str) -> None: ...


def positional(x: int, /) -> None: ...


def unschemable(x: complex) -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (no_annotation, "'no_annotation'.*annotations.*Missing"),
        (stars, r"'stars'.*'\*names'"),
        (double_stars, r"'double_stars'.*'\*\*names'"),
        (positional, "'positional'.*'x' is positional only"),
        (unschemable, "'unschemable'.*complex"),
    ],
)
def test_signatures_that_no_model_can_call_are_refused(
    function: Callable[..., Any], says: str
) -> None:
    """In one line that names the tool and what is wrong."""
    with pytest.raises(TypeError, match=says) as refused:
        tool(function)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "a b", "é", "a" * 65, "a\n", "a/b"])
def test_names_are_those_of_the_contract(name: str) -> None:
    """1 to 64 of A-Z a-z 0-9 _ . : - and nothing else."""
    with pytest.raises(ValueError, match="name") as refused:
        tool(name=name)(lambda: None) if name else tool(lambda: None)
    assert "\n" not in str(refused.value)
