"""Workflows: named prompts with typed parameters, as clients see them (§3.1)."""

from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

from contextd.core.values import JsonObject

Scalar: TypeAlias = str | int | float | bool


class ParameterType(StrEnum):
    """What a parameter's value is. `enum` is one of a list of strings."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    ENUM = "enum"


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One parameter of a workflow. What does not apply to its type is null.

    `min` and `max` are inclusive, of `integer` and `number`. `max_length` is in characters, of
    `string`. `choices` are of `enum`. `default` is null where there is none.
    """

    name: str
    type: ParameterType
    description: str
    required: bool
    default: Scalar | None
    choices: list[str] | None
    min: int | float | None
    max: int | float | None
    max_length: int | None


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt that a client can send by its name. `parameters` are in the order of its file.

    `error` says in words why its file cannot be used; then nothing else but `name` is filled in.
    """

    name: str
    title: str
    description: str
    parameters: list[Parameter]
    error: str | None = None


class WorkflowPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of workflows, by name."""

    items: list[Workflow]
    next_cursor: str | None


def parameters_schema(workflow: Workflow) -> JsonObject:
    """What `parameters` of a send must look like, as JSON Schema (draft 2020-12)."""
    return {
        "type": "object",
        "properties": {each.name: _schema(each) for each in workflow.parameters},
        "required": [each.name for each in workflow.parameters if each.required],
        "additionalProperties": False,
    }


def _schema(parameter: Parameter) -> JsonObject:
    is_enum = parameter.type is ParameterType.ENUM
    facts: dict[str, Any] = {
        "type": "string" if is_enum else parameter.type.value,
        "description": parameter.description or None,
        "default": parameter.default,
        "enum": parameter.choices,
        "minimum": parameter.min,
        "maximum": parameter.max,
        "maxLength": parameter.max_length,
    }
    return {word: value for word, value in facts.items() if value is not None}
