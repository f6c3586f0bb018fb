"""`GET /schema/openapi.json` (§12): every operation, its parameters and its problems.

The three hottest routes are bare ASGI handlers, of which Litestar documents nothing. So the document is
made from an application of its own, in which those two stand as ordinary handlers that are never
called; what runs and what is described share parameters and types.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from litestar import Litestar, MediaType, Response, get, head, post
from litestar.datastructures import ResponseHeader, State
from litestar.di import Provide
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.params import FromPath, JSONBody, QueryParameter

from contextd import __version__
from contextd.core import branch, context, machine, message, producing, tool_call, turn, workflow
from contextd.core.message import Pull
from contextd.core.producing import AppendAnswer, AppendRequest
from contextd.core.signal import Signal
from contextd.core.values import ID_PATTERN, SEQUENCE_MAX
from contextd.http import documented, health, turns
from contextd.http.content import WAIT_S_MAX
from contextd.http.documented import Position, refuses, tagged

_End = Annotated[
    int | None,
    QueryParameter(ge=0, le=SEQUENCE_MAX, description="The last chunk that is wanted, inclusive"),
]
_Wait = Annotated[
    float, QueryParameter(ge=0, le=WAIT_S_MAX, description="Seconds to wait for something new")
]
_PULL_RESPONSES = {
    304: ResponseSpec(None, description="The reader's copy (If-None-Match) is still right"),
    **refuses(400, 404, 503),
}
_PULL_HEADERS = [
    ResponseHeader(name="ETag", description="From ids, positions and status", value=""),
    ResponseHeader(name="Cache-Control", description="`immutable` where it is", value=""),
]


@get(
    "/contexts/{context_id:str}/messages/{message_id:str}/content",
    responses=_PULL_RESPONSES,
    response_headers=_PULL_HEADERS,
)
async def pull_content(
    context_id: FromPath[str],
    message_id: FromPath[str],
    from_sequence: Position = 0,
    to_sequence: _End = None,
    wait: _Wait = 0,
) -> Pull:
    """Pulls the text after a position. With `to_sequence` the answer has no head, status or final."""
    raise AssertionError("only described, never called")


@head(
    "/contexts/{context_id:str}/messages/{message_id:str}/content",
    responses=_PULL_RESPONSES,
    response_headers=_PULL_HEADERS,
)
async def head_content(
    context_id: FromPath[str],
    message_id: FromPath[str],
    from_sequence: Position = 0,
    to_sequence: _End = None,
    wait: _Wait = 0,
) -> None:
    """The headers of a pull."""
    raise AssertionError("only described, never called")


@post(
    "/contexts/{context_id:str}/messages/{message_id:str}/chunks",
    responses=refuses(400, 404, 409, 413, 415, 503),
    status_code=200,
)
async def append_chunks(
    context_id: FromPath[str], message_id: FromPath[str], data: JSONBody[AppendRequest]
) -> AppendAnswer:
    """Stores chunks of a produced message, each once: a batch, one, or lines as they come."""
    raise AssertionError("only described, never called")


@get(
    "/contexts/{context_id:str}/stream",
    media_type="text/event-stream",
    responses=refuses(400, 404, 503),
)
async def stream_signals(
    context_id: FromPath[str],
    throttle_ms: Annotated[int, QueryParameter(ge=0, le=1000)] = 100,
    heartbeat: Annotated[float, QueryParameter(ge=5, le=60)] = 15,
    framing: Annotated[Literal["unnamed", "named"], QueryParameter()] = "unnamed",
    last_event_id: Annotated[str | None, QueryParameter(description="A cursor")] = None,
) -> str:
    """The stream of signals: server-sent events without any text of a message."""
    raise AssertionError("only described, never called")


_DESCRIBED = tagged("content", pull_content, head_content, append_chunks, stream_signals)
_CONFIG = OpenAPIConfig(
    title="contextd",
    version=__version__,
    description="Conversations whose stream carries only signals: text is pulled, exactly.",
    use_handler_docstrings=True,
    path="/described",  # never served: it only must not be in the way of the route below
    render_plugins=[JsonRenderPlugin(path="/openapi.json")],
)


def make_document(
    handlers: Sequence[HTTPRouteHandler],
    dependencies: Mapping[str, Provide],
    providers: Sequence[str],
) -> dict[str, Any]:
    """The document of these handlers and of the routes that are only described here."""
    app = Litestar(
        route_handlers=[*handlers, *_DESCRIBED, get_document],
        dependencies=dependencies,
        openapi_config=_CONFIG,
        logging_config=None,
    )
    document: dict[str, Any] = app.openapi_schema.to_schema()
    schemas = document["components"]["schemas"]
    schemas |= _in_their_own_words(_decoder_schemas(schemas))
    for name in ("ContextRequest", "ContextPatch"):
        schemas[name]["properties"]["provider"] = {"enum": [*providers, None], "default": None}
    for path, method in _BODY_OPTIONAL:
        document["paths"][path][method]["requestBody"]["required"] = False
    for path, forms in _FORMS.items():
        document["paths"][path]["get"]["responses"]["200"]["content"] = forms
    schemas["AppendRequest"] = _either(schemas["AppendRequest"])
    document["paths"][_CHUNKS]["post"]["requestBody"]["content"]["application/x-ndjson"] = _LINES
    for path_item in document["paths"].values():
        for operation in path_item.values():
            _tell_the_truth(operation)
    return document


_TEXT = {"schema": {"type": "string"}}
# What `Accept` chooses from.
_FORMS = {
    "/contexts/{context_id}/messages/{message_id}/content": {
        "application/json": {
            "schema": {
                "anyOf": [
                    {"$ref": "#/components/schemas/Pull"},
                    {"$ref": "#/components/schemas/RangePull"},
                ]
            }
        },
        "text/plain": _TEXT,
    },
    "/machine": {
        "application/json": {"schema": {"$ref": "#/components/schemas/MachineDescription"}},
        turns.MERMAID: _TEXT,
    },
}
_CHUNKS = "/contexts/{context_id}/messages/{message_id}/chunks"
_BODY_OPTIONAL = (
    ("/contexts", "post"),
    ("/contexts/{context_id}/cancel", "post"),
    ("/contexts/{context_id}/messages/{message_id}/complete", "post"),
)


_MODULES = (
    branch,
    context,
    message,
    producing,
    tool_call,
    turn,
    workflow,
    machine,
    documented,
    health,
)


def _decoder_schemas(described: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas as msgspec, which decodes and encodes the values, has them: limits and all."""
    types = [
        type_
        for module in _MODULES
        for name, type_ in vars(module).items()
        if name in described and getattr(type_, "__module__", "").startswith("contextd.")
    ]
    _, schemas = msgspec.json.schema_components(
        [*types, message.RangePull, machine.MachineDescription, *get_args(Signal)],
        ref_template="#/components/schemas/{name}",
    )
    return schemas


def _in_their_own_words(schemas: dict[str, Any]) -> dict[str, Any]:
    """The end of a pattern is `$` in JSON Schema, where Python says it as `\\Z`."""
    text = msgspec.json.encode(schemas).replace(rb'\\Z"', b'$"')
    found: dict[str, Any] = msgspec.json.decode(text)
    return found


def _either(schema: dict[str, Any]) -> dict[str, Any]:
    """A batch, or one chunk: as two schemas, since one cannot say that."""
    fields = schema["properties"]
    shared = {"type": "object", "additionalProperties": False}
    return {
        "description": schema["description"],
        "anyOf": [
            {
                **shared,
                "properties": {"epoch": fields["epoch"], "chunks": _present(fields["chunks"])},
                "required": ["chunks"],
            },
            {
                **shared,
                "properties": {
                    "epoch": fields["epoch"],
                    "content": _present(fields["content"]),
                    "sequence": fields["sequence"],
                },
                "required": ["content"],
            },
        ],
    }


def _present(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that may be left out, where it is given."""
    (given,) = (choice for choice in schema["anyOf"] if choice != {"type": "null"})
    found: dict[str, Any] = given
    return found


_LINES = {
    "schema": {
        "type": "string",
        "description": "Lines of JSON: first maybe `epoch`, then chunks, last maybe `complete`.",
    }
}
_EVENT = {
    "type": "object",
    "description": "One server-sent event; `data` is the JSON of a signal.",
    "properties": {
        "id": {"type": "string", "description": "A cursor"},
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "oneOf": [
                    {"$ref": f"#/components/schemas/{signal.__name__}"}
                    for signal in get_args(Signal)
                ]
            },
        },
        "retry": {"type": "integer"},
    },
}


def _tell_the_truth(operation: dict[str, Any]) -> None:
    """Mends what Litestar describes by its own idea: optional parameters, its 400, and the stream."""
    for parameter in operation.get("parameters", ()):
        _tell_the_truth_of_parameter(parameter["schema"])
        if parameter["in"] == "path" and parameter["name"] != "workflow":  # named by its file
            parameter["schema"]["pattern"] = ID_PATTERN
    for status, response in list(operation["responses"].items()):
        content = response.get("content", {})
        if "application/json" in content and int(status) >= 400:
            del operation["responses"][status]
        if "text/event-stream" in content and status == "200":
            content["text/event-stream"]["schema"] = _EVENT


def _tell_the_truth_of_parameter(schema: dict[str, Any]) -> None:
    """A parameter may be absent, but never null; and a least value of 0 is one too."""
    for choice in schema.pop("oneOf", ()):
        if choice["type"] != "null":
            schema.update(choice)
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    if isinstance(schema.get("type"), list):
        (schema["type"],) = (name for name in schema["type"] if name != "null")
    if schema.get("default") == "":
        del schema["default"]
    if schema.get("type") == "integer":
        schema.setdefault("minimum", 0)


def methods_of(handlers: Sequence[HTTPRouteHandler]) -> list[tuple[re.Pattern[str], str]]:
    """For each path a pattern, and the methods that it has, as `Allow` names them."""
    methods: dict[str, set[str]] = {}
    for handler in [*handlers, *_DESCRIBED, get_document]:
        for path in handler.paths:
            methods.setdefault(re.sub("{[^}]+}", "[^/]+", path), set()).update(handler.http_methods)
    return [
        (re.compile(path), ", ".join([*sorted(found), "OPTIONS"]))
        for path, found in methods.items()
    ]


@get("/schema/openapi.json", media_type=MediaType.JSON, responses=refuses(), sync_to_thread=True)
def get_document(state: State) -> Response[bytes]:
    """This document."""
    return Response(state.openapi_document(), headers={"content-type": "application/json"})
