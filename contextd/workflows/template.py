"""Bodies of workflows: a small, closed part of Jinja2 that cannot run for ever.

A thread cannot be stopped from outside, so a template is made to stop by itself. Only the constructs
of `_ALLOWED` compile: no macros, no includes, no blocks. What is left can take long in two ways only.
It can loop, and it can make a text or a list ever larger. So each iteration and the result of each
operation that can grow (`_GROWING`, `+` and `*`) passes through `_Allowance`, which counts it,
weighs it and looks at the clock. Operations whose result can be much larger than what goes in are
weighed before they run, or are missing.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from contextd.workflows.front_matter import BrokenWorkflow

STEPS_MAX = 100_000
RANGE_MAX = 10_000
CHARS_MAX = 1_000_000  # of the whole text, and of each value on the way
TIME_MAX_S = 1.0
DIGITS_MAX = 4000  # of a whole number: one division of two much larger ones takes seconds
PRECISION_MAX = 100

Clock = Callable[[], float]


class TemplateStopped(Exception):
    """A limit was reached. The words hold nothing of the values."""


class Template:
    """A body that compiled. It may be rendered by several threads at once."""

    def __init__(self, body: str, parameters: Iterable[str], first_line: int = 1) -> None:
        """Raises `BrokenWorkflow`; `first_line` is the body's line in its file."""
        try:
            tree = _ENVIRONMENT.parse(body)
            _check(tree, frozenset(parameters), first_line)
            code = _ENVIRONMENT.compile(_Metered().visit(tree))
        except TemplateSyntaxError as error:
            line = error.lineno + first_line - 1
            raise BrokenWorkflow(f"line {line}: {error.message}") from error
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise BrokenWorkflow("its body cannot be compiled: too deeply nested") from error
        self._template = _ENVIRONMENT.template_class.from_code(
            _ENVIRONMENT, code, _ENVIRONMENT.make_globals(None)
        )

    def render(self, values: Mapping[str, Any], clock_s: Clock = time.monotonic) -> str:
        """The text for `values`. Raises `TemplateStopped`, or what an expression raised."""
        allowance = _Allowance(clock_s)
        pieces, chars = [], 0
        for piece in self._template.generate({**values, _ALLOWANCE: allowance}):
            allowance.spend()
            chars += len(piece)
            if chars > CHARS_MAX:
                raise TemplateStopped(f"its text would have more than {CHARS_MAX} characters")
            pieces.append(piece)
        return "".join(pieces)


class _Allowance:
    """What one rendering may still take."""

    def __init__(self, clock_s: Clock) -> None:
        self._clock_s = clock_s
        self._stop_at_s = clock_s() + TIME_MAX_S
        self._steps = 0

    def spend(self) -> None:
        self._steps += 1
        if self._steps > STEPS_MAX:
            raise TemplateStopped(f"it takes more than {STEPS_MAX} steps")
        if self._clock_s() > self._stop_at_s:
            raise TemplateStopped(f"it takes more than {TIME_MAX_S:g} s")


# The context's key is no identifier, so no template can name it.
_ALLOWANCE = "<allowance>"


def _weight(value: object) -> int:
    """About as many as the characters it has, written out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(1 + (len(item) if isinstance(item, str) else 20) for item in value)
    if isinstance(value, int) and value.bit_length() > DIGITS_MAX * 10 // 3:
        raise TemplateStopped(f"a number would have more than {DIGITS_MAX} digits")
    return 1


def _weighed(weight: int) -> None:
    if weight > CHARS_MAX:
        raise TemplateStopped(f"a value would have more than {CHARS_MAX} characters")


@pass_context
def _grown(context: Context, value: Any) -> Any:
    """What an operation made, if it may be that large."""
    context[_ALLOWANCE].spend()
    if isinstance(value, Iterator):
        value = list(value)  # `reverse` and `unique` make a list's worth at most
    _weighed(_weight(value))
    return value


@pass_context
def _flat(context: Context, value: Any) -> Any:
    """A list literal. Lists of lists could double in size with each line."""
    if any(isinstance(item, list | tuple) for item in value):
        raise TemplateStopped("a list cannot hold lists")
    return _grown(context, value)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through."""
    allowance = context[_ALLOWANCE]
    for item in items:
        allowance.spend()
        yield item


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > RANGE_MAX:
        raise TemplateStopped(f"range goes to {RANGE_MAX} numbers")
    return numbers


def _replace(text: object, old: object, new: object) -> str:
    text, old, new = str(text), str(old), str(new)
    _weighed(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _join(items: Iterable[object], between: object = "") -> str:
    texts = [str(item) for item in items]
    _weighed(sum(map(len, texts)) + len(texts) * len(str(between)))
    return str(between).join(texts)


def _indent(text: object, width: int = 4, first: bool = False) -> str:
    lines = str(text).split("\n")
    _weighed(len(str(text)) + len(lines) * width)
    rest = [" " * width + line if line else line for line in lines]
    return "\n".join(rest if first else [lines[0], *rest[1:]])


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > PRECISION_MAX:  # it makes a number of so many digits on the way
        raise TemplateStopped(f"round goes to {PRECISION_MAX} digits")
    return FILTERS["round"](value, precision, method)


def _tojson(value: object) -> str:
    # Jinja's own is for HTML: it would write `<` and quotes as escapes.
    return json.dumps(value, ensure_ascii=False)


_PLAIN_FILTERS = """
    abs capitalize count d default first float int last length list lower max min reverse sort
    sum title trim truncate unique upper urlencode wordcount
"""
_FILTERS: dict[str, Any] = {
    **{name: FILTERS[name] for name in _PLAIN_FILTERS.split()},
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "tojson": _tojson,
}
_METHODS = """
    capitalize count endswith find isalnum isalpha isdigit lower lstrip removeprefix removesuffix
    rsplit rstrip split splitlines startswith strip title upper
"""
_SAFE_METHODS = frozenset(_METHODS.split())
_INTERNAL = {"<grown>": _grown, "<flat>": _flat, "<counted>": _counted}


class _Environment(ImmutableSandboxedEnvironment):
    # Naming them here also keeps Jinja from computing them while it compiles.
    intercepted_binops = frozenset({"+", "*", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context[_ALLOWANCE].spend()
        if operator == "%" and isinstance(left, str):
            raise TemplateStopped("% is for numbers")
        if operator == "*":
            _weighed(_product_weight(left, right))
        result = super().call_binop(context, operator, left, right)
        _weighed(_weight(result))
        return result

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` can pad to any width; without this it would pass unasked."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only loops and texts have attributes, and of a text's only what cannot make it large."""
        if isinstance(obj, str):
            return attr in _SAFE_METHODS
        return isinstance(obj, LoopContext) and super().is_safe_attribute(obj, attr, value)


def _product_weight(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            return _weight(value) * max(times, 0)
    return 0  # of two numbers, each of which was weighed


def _make_environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "" if value is None else value,
        cache_size=0,
    )
    environment.globals = {"range": _range}
    environment.filters = {**_FILTERS, **_INTERNAL}
    return environment


_ENVIRONMENT = _make_environment()

_ALLOWED: tuple[type[nodes.Node], ...] = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign, nodes.Const,
    nodes.Name, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.And,
    nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod,
    nodes.Neg, nodes.Pos, nodes.Concat, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call,
    nodes.Keyword, nodes.List, nodes.Tuple,
)  # fmt: skip
_GROWING = (nodes.Filter, nodes.Concat, nodes.Call)


def _check(tree: nodes.Template, parameters: frozenset[str], first_line: int) -> None:
    for node in tree.find_all(nodes.Node):
        problem = _refused(node)
        if problem:
            raise BrokenWorkflow(f"line {node.lineno + first_line - 1}: {problem}")
    unknown = meta.find_undeclared_variables(tree) - parameters - {"range"}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise BrokenWorkflow(f"its body uses what is not one of its parameters: {names}")


def _refused(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.For) and node.recursive:
        return "a loop cannot be recursive"
    if not isinstance(node, _ALLOWED):
        return f"{type(node).__name__} is not a part of Jinja that can be used here"
    if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
        return f"there is no filter {node.name} here"
    if isinstance(node, nodes.Name) and node.name == "self":
        return "self has nothing here"
    if isinstance(node, nodes.Call) and (node.dyn_args is not None or node.dyn_kwargs is not None):
        return "* and ** cannot be used in calls"
    return None


class _Metered(NodeTransformer):
    """Leads everything that can grow or repeat through the allowance."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _through("<counted>", node.iter)
        if isinstance(node, nodes.List | nodes.Tuple) and getattr(node, "ctx", "load") == "load":
            return _through("<flat>", node)
        return _through("<grown>", node) if isinstance(node, _GROWING) else node


def _through(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
