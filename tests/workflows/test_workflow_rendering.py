"""A workflow makes a text of parameters that fit, and always comes to an end."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from workflow_writing import Write

from contextd.core.errors import FieldError, InvalidRequest
from contextd.workflows import Workflows
from contextd.workflows.front_matter import BrokenWorkflow
from contextd.workflows.template import Template, TemplateStopped

PARAMETERS = """
parameters:
  code: {max_length: 10}
  style: {type: enum, choices: [short, long], default: short}
  remarks: {type: integer, min: 1, max: 10, default: 3}
  patience: {type: number, required: false}
  praise: {type: boolean, default: false}
"""


def refused(workflows: Workflows, name: str, parameters: dict[str, Any]) -> list[FieldError]:
    with pytest.raises(InvalidRequest) as error:
        workflows.render(name, parameters)
    errors: list[FieldError] = error.value.facts["errors"]
    return errors


def test_parameters_and_defaults_become_text(write: Write, workflows: Workflows) -> None:
    """What may be left out and was is nothing, and can be asked for."""
    body = "{{ style }} {{ remarks }} [{{ patience }}] {{ praise }}: {{ code }}\n"
    write("review", PARAMETERS, body + "{% if patience is none %}\nHurry.\n{% endif %}")
    assert workflows.render("review", {"code": "a < b"}) == "short 3 [] False: a < b\nHurry.\n"
    assert workflows.render(
        "review", {"code": "{{ x }}", "style": "long", "remarks": 4.0, "patience": 0.5}
    ) == ("long 4 [0.5] False: {{ x }}\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"code": 1}, "must be a string"),
        ({"code": None}, "must be a string"),
        ({"code": "x" * 11}, "must have at most 10 characters"),
        ({"code": "\0"}, "must not contain U+0000"),
        ({"style": "medium"}, "must be one of: short, long"),
        ({"style": ["short"]}, "must be one of: short, long"),
        ({"remarks": 0}, "must be at least 1"),
        ({"remarks": 11}, "must be at most 10"),
        ({"remarks": 1.5}, "must be a whole number"),
        ({"remarks": True}, "must be a whole number"),
        ({"remarks": 2**53}, "must be a whole number"),
        ({"patience": "1"}, "must be a number"),
        ({"patience": float("nan")}, "must be a number"),
        ({"praise": 1}, "must be true or false"),
        ({"other": 1}, "unknown parameter"),
    ],
)
def test_a_wrong_parameter_is_named(
    write: Write, workflows: Workflows, wrong: dict[str, Any], message: str
) -> None:
    """By its place in the request, in words without its value."""
    write("review", PARAMETERS)
    (name,) = wrong
    expected = [FieldError(field=f"payload.parameters.{name}", message=message)]
    assert refused(workflows, "review", {"code": "x", **wrong}) == expected


def test_all_wrong_parameters_are_named_at_once(write: Write, workflows: Workflows) -> None:
    """Missing, wrong and unknown ones; of very many, the first."""
    write("review", PARAMETERS)
    fields = [error.field for error in refused(workflows, "review", {"praise": 0, "x": 1})]
    assert fields == [f"payload.parameters.{name}" for name in ("code", "praise", "x")]
    assert len(refused(workflows, "review", {f"x{number}": 1 for number in range(500)})) == 100


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())
NAMES = st.sampled_from(["code", "style", "remarks", "patience", "praise", "other"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Workflows:
    """One folder for all examples of a property."""
    folder = tmp_path_factory.mktemp("plain")
    text = f"---{PARAMETERS}---\n>{{{{ code }}}}{{{{ patience }}}}"
    (folder / "plain.md").write_text(text, encoding="utf-8")
    return Workflows(folder)


@given(parameters=st.dictionaries(NAMES, VALUES))
def test_any_parameters_are_taken_or_refused(plain: Workflows, parameters: dict[str, Any]) -> None:
    """Nothing else ever happens, and a refusal names a parameter."""
    try:
        answer = plain.render("plain", parameters)
    except InvalidRequest as error:
        answer = error.facts["errors"][0].field
    assert answer.startswith((">", "payload.parameters."))


@pytest.mark.parametrize(
    "body", ["", "{# nothing #}", "{% if code == 'a' %}A{% endif %}", "{{ '\\0' }}"]
)
def test_a_text_is_never_empty_and_has_no_nul(
    write: Write, workflows: Workflows, body: str
) -> None:
    """§3.1 takes neither."""
    write("void", "parameters: {code: {}}", body)
    (error,) = refused(workflows, "void", {"code": "b"})
    assert error.field == "payload.workflow"


@pytest.mark.parametrize(
    "body",
    ["{{ 1 / (code|length - 6) }}", "{{ code.nothing }}", "{{ code + 1 }}", "{{ '\\ud800' }}"],
)
def test_a_body_that_fails_is_a_refusal_without_the_values(
    write: Write, workflows: Workflows, body: str
) -> None:
    """Neither in the answer nor in the log."""
    write("fails", "parameters: {code: {}}", body)
    with capture_logs() as logs:
        (error,) = refused(workflows, "fails", {"code": "secret"})
    assert error.field == "payload.workflow"
    assert "secret" not in error.message
    assert "secret" not in repr(logs)
    assert [entry["workflow"] for entry in logs] == ["fails"]


def test_a_body_is_plain_text_and_not_html(write: Write, workflows: Workflows) -> None:
    """Nothing is escaped, and JSON is JSON."""
    write("plain", "parameters: {code: {}}", "<b>{{ code }}</b> {{ code|tojson }}")
    assert workflows.render("plain", {"code": "ä <'&\""}) == '<b>ä <\'&"</b> "ä <\'&\\""'


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{% for line in 'a\nb'.split('\n') %}{{ loop.index }}{{ line }}{% endfor %}", "1a2b"),
        ("{% for n in range(3) if n != 1 %}{{ n }}{% else %}none{% endfor %}", "02"),
        ("{% set x = ['b', 'a']|sort %}{{ x|join(', ') }}", "a, b"),
        ("{{ 'b' if 'a' in ['a', 'b'] else 'c' }}", "b"),
        ("{{ [3, 1, 2]|reverse|list }}", "[2, 1, 3]"),
        ("{{ 'a\nb'|indent(2) }}|{{ 'aXa'|replace('X', '-') }}|{{ 'a' ~ 1 }}", "a\n  b|a-a|a1"),
        ("{{ 7 // 2 * 2 + 7 % 2 }} {{ 'ab' * 2 }} {{ 'abc'[1:] }}", "7 abab bc"),
        ("{% raw %}{{ x }}{% endraw %}", "{{ x }}"),
    ],
)
def test_what_a_body_can_do(body: str, text: str) -> None:
    """Loops, conditions, small values and filters."""
    assert Template(body, []).render({}) == text


@pytest.mark.parametrize(
    "body",
    [
        "{% include 'other' %}",
        "{% import 'other' as o %}",
        "{% extends 'other' %}",
        "{% block a %}{% endblock %}",
        "{% macro a() %}{% endmacro %}",
        "{% filter upper %}a{% endfilter %}",
        "{% set a %}b{% endset %}",
        "{% for a in 'b' recursive %}{% endfor %}",
        "{{ 2 ** 9 }}",
        "{{ {'a': 1} }}",
        "{{ 'a'|center(9) }}",
        "{{ range(*[1]) }}",
        "{{ self }}",
        "{{ loop }}",
        "{{ unknown }}",
        "{{ lipsum() }}",
        "{% if %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in 'b' %}" * 50 + "{% endfor %}" * 50,
    ],
)
def test_what_a_body_cannot_do_is_found_when_it_is_read(body: str) -> None:
    """Not when somebody sends it."""
    with pytest.raises(BrokenWorkflow):
        Template(body, [])


def test_an_error_in_a_body_names_the_line_of_the_file(write: Write, workflows: Workflows) -> None:
    """Front matter and empty lines included."""
    write("bad", "title: Bad", "\n\nfine\n{{ 2 ** 3 }}")
    error = workflows.get("bad").error
    assert error is not None
    assert error.startswith("line 7: Pow ")


@pytest.mark.parametrize("expression", ["''.__class__", "'{:>9}'.format(1)", "''['__class__']"])
def test_the_inside_of_values_is_out_of_reach(
    write: Write, workflows: Workflows, expression: str
) -> None:
    """The sandbox has no way out."""
    write("curious", body="{{ " + expression + " }}")
    (error,) = refused(workflows, "curious", {})
    assert "SecurityError" in error.message


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10001) %}{% endfor %}",
        "{% set x = 'aaaa' %}" + "{% set x = x ~ x %}" * 60,
        "{% set x = 'aaaa' %}" + "{% set x = x + x %}" * 60,
        "{% set x = ['a'] %}" + "{% set x = x + x %}" * 60,
        "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60,
        "{% set x = '\"' %}" + "{% set x = x|tojson %}" * 60,
        "{% set x = 9 %}" + "{% set x = x * x %}" * 60,
        "{{ 'a' * 9999999999 }}",
        "{{ 9999999999 * ['a'] }}",
        "{{ 5|round(-20000000) }}",
        "{{ 1|round(20000000, 'ceil') }}",
        "{% set x = 9 %}" + "{% set x = x * x %}" * 14,
        "{{ '%9999999999d' % 1 }}",
        "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
        "{{ ['a', 'b']|join('c' * 999999) }}",
        "{{ ('a\n' * 99999)|indent(99999) }}",
        "{{ 'a' * 600000 }}{{ 'a' * 600000 }}",
    ],
)
def test_a_template_without_end_or_measure_is_stopped(body: str) -> None:
    """By the number of its steps and the size of its values, before they are made."""
    with pytest.raises(TemplateStopped):
        Template(body, []).render({})


def test_a_slow_template_is_stopped_by_the_clock() -> None:
    """A second of its own clock, here one that goes on by a tenth with each look."""
    ticks = count()
    template = Template("{% for n in range(100) %}{{ n }}{% endfor %}", [])
    with pytest.raises(TemplateStopped, match="more than 1 s"):
        template.render({}, lambda: next(ticks) / 10)


def test_a_stopped_template_is_a_refusal(folder: Path, write: Write) -> None:
    """The client hears which limit it was."""
    ticks = count()
    workflows = Workflows(folder, clock_s=lambda: next(ticks) * 2.0)
    write("slow", body="{{ 'a' ~ 'b' }}")
    assert refused(workflows, "slow", {}) == [
        FieldError(field="payload.workflow", message="was stopped: it takes more than 1 s")
    ]
