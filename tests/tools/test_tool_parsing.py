"""A model's text becomes arguments, or words that say what is wrong with it (§8)."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextd.core.values import JsonObject
from contextd.tools.arguments import DEPTH_MAX, ArgumentsError, parse

ROOM_BYTES = 1_000_000


def nested(levels: int) -> JsonObject:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("{}", {}),
        (' {"a": [1, 2.5, null, true, "x"]}\n', {"a": [1, 2.5, None, True, "x"]}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (json.dumps(nested(DEPTH_MAX)), nested(DEPTH_MAX)),
        ('{"a": {"b": 1}, "c": {"b": 2}}', {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_a_json_object_is_parsed(text: str, arguments: JsonObject) -> None:
    """As it is written."""
    assert parse(text, bytes_max=ROOM_BYTES) == arguments


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ('{"a": 1', "not JSON: Expecting ',' delimiter at line 1, column 8"),
        ("{'a': 1}", "not JSON: .* at line 1, column 2"),
        ('{"a": 1} x', "not JSON: Extra data at line 1, column 10"),
        ('{"a": 1, "b": 2, "a": 3}', 'the name "a" is twice in one object'),
        ('{"x": [{"a": 1, "a": 1}]}', 'the name "a" is twice in one object'),
        ("[1]", "have to be a JSON object, not an array"),
        ("null", "not null"),
        ("true", "not a boolean"),
        ("1.5", "not a number"),
        ('"{}"', "not a string"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ('{"a": -Infinity}', "-Infinity is not a JSON value"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"a": "\\u0000"}', "U\\+0000"),
        ('{"\\u0000": 1}', "U\\+0000"),
        ('{"a": "\x00"}', "not JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": "\ud800"}', "half of a surrogate pair"),
        (json.dumps(nested(DEPTH_MAX + 1)), "nested more than 64 levels"),
        ('{"a":' * 90_000, "nested more than 64 levels"),
        ("[" * 90_000, "nested more than 64 levels"),
        ('{"a": "' + "é" * 600_000 + '"}', "larger than 1000000 bytes"),
        ("x" * 2_000_000, "larger than 1000000 bytes"),
        ('{"' + "k" * 9999 + '": 1, "' + "k" * 9999 + '": 1}', "is twice"),
    ],
)
def test_text_that_is_no_json_object_is_refused(text: str, says: str) -> None:
    """In short words that a model can put it right by."""
    with pytest.raises(ArgumentsError, match=says) as refused:
        parse(text, bytes_max=ROOM_BYTES)
    assert len(str(refused.value)) < 300


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), VALUES))
def test_what_is_parsed_is_what_was_written_or_is_refused(value: JsonObject) -> None:
    """No object is changed on the way."""
    text = json.dumps(value)
    if "\\u0000" in text:
        with pytest.raises(ArgumentsError):
            parse('{"a": "\\u0000"}', bytes_max=ROOM_BYTES)
        return
    assert parse(text, bytes_max=ROOM_BYTES) == value


@given(st.text() | st.text(alphabet='{}[]",:0123456789eE+-.\\utrfalsn '))
def test_any_text_is_parsed_or_refused_in_words(text: str) -> None:
    """No other exception than the one that is promised."""
    try:
        parsed = parse(text, bytes_max=ROOM_BYTES)
    except ArgumentsError:
        return
    assert isinstance(parsed, dict)


@pytest.mark.parametrize(
    ("text", "value"), [("1.0", 1), ("-2.00", -2), ("1e3", 1000), ("1.5", 1.5), ("1e300", 1e300)]
)
def test_a_whole_number_is_an_integer_however_it_is_written(text: str, value: float) -> None:
    """JSON Schema takes `1.0` for an integer, and so must the tool that gets it."""
    parsed = parse(f'{{"n": {text}}}', bytes_max=100)
    assert parsed == {"n": value}
    assert type(parsed["n"]) is type(value)
