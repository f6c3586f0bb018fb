"""Makes tools of Python functions: the signature becomes the JSON Schema, the docstring its words."""

import inspect
import re
from collections.abc import Awaitable, Callable
from types import NoneType
from typing import (
    Annotated,
    Any,
    Optional,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import docstring_parser
import msgspec

from contextd.core.values import WHOLE_ID_PATTERN, JsonObject
from contextd.tools import Tool, ToolError
from contextd.tools.text import one_line
from contextd.tools.threads import in_tool_thread

P = ParamSpec("P")
T = TypeVar("T")

REASON_CHARS_MAX = 300

_MARK = "__contextd_tool__"


@overload
def tool(function: Callable[P, T], /) -> Callable[P, T]: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    read_only: bool = False,
    idempotent: bool = False,
    requires_approval: bool = False,
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    read_only: bool = False,
    idempotent: bool = False,
    requires_approval: bool = False,
) -> Any:
    """Marks a function as a tool. It stays what it was and can be called as before.

    `@tool` or `@tool(read_only=True, …)`. Parameters are described by their annotations (what msgspec
    can convert) and by a docstring in the Google or the Sphinx style. An async function is awaited, any
    other runs in a thread. What it returns is for the model: text, or a value that becomes JSON; to say
    that it cannot be done, raise `ToolError`.

    Raises `TypeError` for a signature that no model can call, `ValueError` for a bad name.
    """

    def mark(marked: Callable[..., Any]) -> Callable[..., Any]:
        made = _make_tool(marked, name=name, description=description)
        made = msgspec.structs.replace(
            made, read_only=read_only, idempotent=idempotent, requires_approval=requires_approval
        )
        setattr(marked, _MARK, made)
        return marked

    return mark if function is None else mark(function)


def tool_of(value: object) -> Tool | None:
    """The tool that `value` is or, as a function, was marked as; None when it is neither."""
    found = value if isinstance(value, Tool) else getattr(value, _MARK, None)
    return found if isinstance(found, Tool) else None


def check_name(name: str) -> str:
    """`name`. Raises `ValueError` unless it is 1 to 64 of A-Z a-z 0-9 _ . : -."""
    if not re.match(WHOLE_ID_PATTERN, name):
        raise ValueError(
            f"{one_line(name, 80)!r} cannot be a tool's name: it has to be 1 to 64 of "
            "A-Z a-z 0-9 _ . : -"
        )
    return name


def _make_tool(function: Callable[..., Any], *, name: str | None, description: str | None) -> Tool:
    name = check_name(name or str(getattr(function, "__name__", "")))
    words = docstring_parser.parse(inspect.getdoc(function) or "")
    described = {item.arg_name: item.description or "" for item in words.params}
    defaults, arguments = _parameters(function, name, described)
    return Tool(
        name=name,
        description=(words.description or "").strip() if description is None else description,
        parameters=_schema(arguments, name, defaults),
        run=_runner(function, arguments),
    )


def _parameters(
    function: Callable[..., Any], name: str, described: dict[str, str]
) -> tuple[dict[str, Any], type[msgspec.Struct]]:
    """The defaults, and a type with a field for each parameter."""
    types = _types(function, name)
    defaults: dict[str, Any] = {}
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for parameter in inspect.signature(function).parameters.values():
        _check_kind(parameter, name)
        type_ = types.get(parameter.name, Any)
        if parameter.default is None:
            type_ = _or_none(type_)
        type_ = _described(type_, described.get(parameter.name, ""))
        if parameter.default is parameter.empty:
            fields.append((parameter.name, type_))
            continue
        # Only for what the schema says: what is not given is left to Python, which knows the default.
        fields.append((parameter.name, type_, msgspec.field(default_factory=lambda: None)))
        defaults[parameter.name] = parameter.default
    arguments = msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
    return defaults, arguments


def _types(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except Exception as error:  # an annotation can be any expression
        why = one_line(f"{type(error).__name__}: {error}", REASON_CHARS_MAX)
        raise TypeError(f"tool {name!r}: its annotations cannot be read: {why}") from error


def _check_kind(parameter: inspect.Parameter, name: str) -> None:
    refused: dict[object, str] = {
        parameter.VAR_POSITIONAL: "'*{}' takes any number of values, which a schema cannot name",
        parameter.VAR_KEYWORD: "'**{}' takes any names, which a schema cannot list",
        parameter.POSITIONAL_ONLY: "'{}' is positional only, but arguments come by name",
    }
    if reason := refused.get(parameter.kind):
        raise TypeError(f"tool {name!r}: {reason.format(parameter.name)}")


def _or_none(type_: Any) -> Any:
    """`x: int = None` is common, and means it."""
    bare = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    return type_ if bare is Any or NoneType in get_args(bare) else Optional[type_]  # noqa: UP045


def _described(type_: Any, description: str) -> Any:
    """The type with the docstring's words, unless the annotation has its own."""
    own = [item for item in get_args(type_)[1:] if isinstance(item, msgspec.Meta)]
    if not description or any(item.description for item in own):
        return type_
    return Annotated[type_, msgspec.Meta(description=" ".join(description.split()))]


def _schema(arguments: type[msgspec.Struct], name: str, defaults: dict[str, Any]) -> JsonObject:
    try:
        (top,), definitions = msgspec.json.schema_components(
            [arguments], ref_template="#/$defs/{name}"
        )
    except (TypeError, RuntimeError) as error:
        lines = str(error).splitlines()  # the last one names the type
        why = one_line(lines[-1], REASON_CHARS_MAX)
        raise TypeError(f"tool {name!r}: a parameter has no JSON Schema: {why}") from error
    schema: JsonObject = definitions.pop(top["$ref"].removeprefix("#/$defs/"))
    del schema["title"]
    for parameter, default in defaults.items():
        _put_default(schema["properties"][parameter], default)
    return {**schema, "$defs": definitions} if definitions else schema


def _put_default(property_: JsonObject, default: Any) -> None:
    """Where it can be said in JSON: a default can be any object."""
    try:
        property_["default"] = msgspec.json.decode(msgspec.json.encode(default))
    except (TypeError, ValueError, RecursionError):
        property_.pop("default", None)


def _runner(
    function: Callable[..., Any], arguments: type[msgspec.Struct]
) -> Callable[[JsonObject], Awaitable[object]]:
    is_async = inspect.iscoroutinefunction(function)

    async def run(given: JsonObject) -> object:
        converted = _convert(given, arguments)
        if is_async:
            return await function(**converted)
        result = await in_tool_thread(lambda: function(**converted))
        return await result if inspect.isawaitable(result) else result

    return run


def _convert(given: JsonObject, arguments: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        converted = msgspec.convert(given, arguments)
    except msgspec.ValidationError as error:  # what a schema cannot say, such as a date's form
        raise ToolError(f"The arguments do not fit: {error}") from None
    return {name: getattr(converted, name) for name in given}
