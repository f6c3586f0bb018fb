"""Are these the parameters that a workflow asks for?"""

import math
from typing import TypeAlias, assert_never

from contextd.core.errors import FieldError, InvalidRequest
from contextd.core.values import SEQUENCE_MAX, JsonObject
from contextd.core.workflow import Parameter, ParameterType, Scalar, Workflow

ERRORS_MAX = 100  # more than a person reads; what is wrong beyond is found when these are right
FIELD = "payload.parameters"

Filled: TypeAlias = dict[str, Scalar | None]


def check_parameters(workflow: Workflow, given: JsonObject) -> Filled:
    """A value for each parameter: the one given, its default, or none where it may be left out.

    Raises `InvalidRequest` with each wrong parameter. The messages hold nothing of the values.
    """
    filled: Filled = {}
    errors: list[FieldError] = []
    for parameter in workflow.parameters:
        value = _value(parameter, given)
        if isinstance(value, FieldError):
            errors.append(value)
        else:
            filled[parameter.name] = value
    known = {parameter.name for parameter in workflow.parameters}
    errors += [_error(name, "unknown parameter") for name in given if name not in known]
    if errors:
        raise InvalidRequest(*errors[:ERRORS_MAX])
    return filled


def check_value(parameter: Parameter, value: object) -> Scalar | FieldError:
    """`value` as the body gets it, or what is wrong with it."""
    wrong = _wrong_type(parameter, value) or _out_of_range(parameter, value)
    if wrong is not None:
        return _error(parameter.name, wrong)
    assert isinstance(value, str | int | float)  # noqa: S101 - for the type checker; just checked
    # In JSON 3.0 is an integer too.
    return int(value) if parameter.type is ParameterType.INTEGER else value


def _value(parameter: Parameter, given: JsonObject) -> Scalar | FieldError | None:
    if parameter.name in given:
        return check_value(parameter, given[parameter.name])
    if parameter.required:
        return _error(parameter.name, "required")
    return parameter.default


def _wrong_type(parameter: Parameter, value: object) -> str | None:
    match parameter.type:
        case ParameterType.STRING:
            return None if isinstance(value, str) else "must be a string"
        case ParameterType.BOOLEAN:
            return None if isinstance(value, bool) else "must be true or false"
        case ParameterType.INTEGER:
            return None if _is_whole(value) else "must be a whole number"
        case ParameterType.NUMBER:
            return None if is_number(value) else "must be a number"
        case ParameterType.ENUM:
            choices = parameter.choices or []
            return None if value in choices else f"must be one of: {', '.join(choices)}"
        case _ as never:
            assert_never(never)


def _out_of_range(parameter: Parameter, value: object) -> str | None:
    if isinstance(value, str):
        return _wrong_text(parameter, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if parameter.min is not None and value < parameter.min:
        return f"must be at least {parameter.min}"
    if parameter.max is not None and value > parameter.max:
        return f"must be at most {parameter.max}"
    return None


def _wrong_text(parameter: Parameter, value: str) -> str | None:
    if "\0" in value:
        return "must not contain U+0000"
    if parameter.max_length is not None and len(value) > parameter.max_length:
        return f"must have at most {parameter.max_length} characters"
    return None


def is_number(value: object) -> bool:
    """A number that JSON can carry without loss."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= SEQUENCE_MAX if isinstance(value, int) else math.isfinite(value)


def _is_whole(value: object) -> bool:
    if not is_number(value):
        return False
    return isinstance(value, int) or (
        isinstance(value, float) and value.is_integer() and abs(value) <= SEQUENCE_MAX
    )


def _error(name: str, message: str) -> FieldError:
    return FieldError(field=f"{FIELD}.{name[:64]}", message=message)
