"""A workflow's file: YAML between two lines of `---`, then the body."""

import re
from typing import Any

import msgspec
import yaml

from contextd.core.errors import FieldError
from contextd.core.values import DOCUMENT_CHARS_MAX, Document, Label
from contextd.core.workflow import Parameter, ParameterType, Scalar, Workflow
from contextd.workflows.parameters import check_value, is_number

PARAMETERS_MAX = 64
CHOICES_MAX = 256
STRING_CHARS_MAX = 65_536  # of a string parameter whose file gives no max_length

_PARTS = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)(.*)\Z", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
# Words that mean something else in a body.
_WORDS = "and or not in is if else for true false none True False None loop range self context"
_RESERVED = frozenset(_WORDS.split())
_NUMERIC = (ParameterType.INTEGER, ParameterType.NUMBER)


class BrokenWorkflow(Exception):
    """The file cannot be used. The words are for its author: they name no path."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A file taken apart. `body_line` is the file's line, from 1, on which the body starts."""

    workflow: Workflow
    body: str
    body_line: int


class _ParameterForm(msgspec.Struct, forbid_unknown_fields=True):
    type: ParameterType = ParameterType.STRING
    description: Document = ""
    required: bool | None = None
    default: Scalar | None = None
    choices: list[Label] | None = None
    min: int | float | None = None
    max: int | float | None = None
    max_length: int | None = None


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    title: Label | None = None
    description: Document = ""
    parameters: dict[str, _ParameterForm] = {}


def parse(name: str, text: str) -> Source:
    """The workflow `name` as its file's `text` says. Raises `BrokenWorkflow`."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    parts = _PARTS.match(text)
    if parts is None:
        raise BrokenWorkflow("it must begin with YAML between two lines of ---")
    form = _form(parts[1])
    workflow = Workflow(
        name=name,
        title=form.title or name,
        description=form.description,
        parameters=[_parameter(key, each) for key, each in form.parameters.items()],
    )
    body = parts[2].strip("\n")
    body_line = text.count("\n", 0, len(text) - len(parts[2].lstrip("\n"))) + 1
    return Source(workflow=workflow, body=body, body_line=body_line)


def _form(front_matter: str) -> _Form:
    try:
        loaded = yaml.load(front_matter, _Loader)  # noqa: S506 - a SafeLoader
        form = msgspec.convert(loaded or {}, _Form)
    except msgspec.ValidationError as error:
        raise BrokenWorkflow(str(error).replace("`$.", "`")) from error
    except _UNREADABLE as error:
        raise BrokenWorkflow(_in_words(error)) from error
    if len(form.parameters) > PARAMETERS_MAX:
        raise BrokenWorkflow(f"it has more than {PARAMETERS_MAX} parameters")
    return form


# The last four are what PyYAML lets through for a tag such as `!!int` before what is none.
_UNREADABLE = (
    yaml.YAMLError,
    RecursionError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


def _in_words(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 2}: {error.problem}"
    return "its front matter is not YAML that can be read"


def _parameter(name: str, form: _ParameterForm) -> Parameter:
    for wrong in _wrong(name, form):
        raise BrokenWorkflow(f"parameter {name[:64]}: {wrong}")
    max_length = form.max_length or STRING_CHARS_MAX
    parameter = Parameter(
        name=name,
        type=form.type,
        description=form.description,
        required=form.default is None if form.required is None else form.required,
        default=form.default,
        choices=form.choices,
        min=form.min,
        max=form.max,
        max_length=max_length if form.type is ParameterType.STRING else None,
    )
    if form.default is not None:
        wrong_default = check_value(parameter, form.default)
        if isinstance(wrong_default, FieldError):
            raise BrokenWorkflow(f"parameter {name}: its default {wrong_default.message}")
    return parameter


def _wrong(name: str, form: _ParameterForm) -> list[str]:
    """What is wrong with a parameter in itself, most basic first."""
    choices = form.choices or []
    checks = {
        "its name must be 1 to 64 of A-Z a-z 0-9 _ and not a word of the template's language": (
            not _NAME.match(name) or name in _RESERVED
        ),
        "choices go with the type enum, and only with it": (
            bool(choices) != (form.type is ParameterType.ENUM)
        ),
        f"choices must be different from each other and at most {CHOICES_MAX}": (
            len(set(choices)) != len(choices) or len(choices) > CHOICES_MAX
        ),
        "min and max go with the types integer and number only": (
            (form.min, form.max) != (None, None) and form.type not in _NUMERIC
        ),
        "min and max must be numbers within 2^53": (
            not all(is_number(bound) for bound in (form.min, form.max) if bound is not None)
        ),
        "min is above max": (form.min is not None and form.max is not None and form.min > form.max),
        "max_length goes with the type string only": (
            form.max_length is not None and form.type is not ParameterType.STRING
        ),
        f"max_length must be 1 to {DOCUMENT_CHARS_MAX}": (
            form.max_length is not None and not 1 <= form.max_length <= DOCUMENT_CHARS_MAX
        ),
        "a required parameter has no default": form.required is True and form.default is not None,
    }
    return [words for words, is_wrong in checks.items() if is_wrong]


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `no` is a word, a date is a word, nothing is said twice.

    No aliases, because a few lines of them can stand for gigabytes.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class's way to set it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(node.value):
            problem = "the same key twice, or a key that is no word"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,17})\Z", "-+0123456789"),
    ("float", r"[-+]?[0-9]{1,17}(?:\.[0-9]{1,17}(?:[eE][-+]?[0-9]{1,2})?)\Z", "-+0123456789"),
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
