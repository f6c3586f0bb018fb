"""How a request is said in Chat Completions. No I/O: see `contextd.provider.openai`.

The API and the chat templates behind it refuse much of what a history can hold, and a refused history
would be refused with every request to come. So whatever it holds, the messages are well-formed:

- All calls of an answer are in one message, and their results follow it at once, one for each call, in
  the order of the calls, also where something else was said in between.
- A call whose result is missing gets `NO_RESULT`. Without the call the model would not know that it
  may have run.
- A result whose call is not there (left out with what is too old, or written by somebody else) is left
  out: as `tool` it would be refused, and in another role it would speak with the voice of the user or
  of the model.
- Arguments that are no JSON object go as the text in one (`INVALID_ARGUMENTS`): several servers parse
  them and refuse what they cannot read.
- An id of a call that is used twice or too long for the API is replaced, the same way each time.
- Messages of one role in a row are joined by a blank line, and there are none without content.
- There is one system message, the first; what was stored in that role later is joined to it. Chat
  templates refuse one anywhere else.
- A user speaks first: where an answer would, `OPENING` stands before it.
- Where calls are shown and no tool is on offer, the tools that were called are declared all the same,
  with `tool_choice` `none`: several servers refuse calls without `tools`.
- What the server attached to a call, and the reasoning of an answer with calls, go back as they came, to
  the model that they came from.
"""

import hashlib
import json
import re
from collections.abc import Iterator

from contextd.core.message import Role
from contextd.core.values import JsonObject
from contextd.provider import HistoryCall, ModelRequest, ToolOffer
from contextd.provider.storable import load_json

CALL_ID_CHARS_MAX = 40
FUNCTION_NAME_CHARS_MAX = 64
NO_RESULT = "There is no result: the call was not completed."
INVALID_ARGUMENTS = "invalid_arguments"
OPENING = "(The conversation begins with an answer.)"

_FUNCTION_NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{FUNCTION_NAME_CHARS_MAX}}}\Z")
_NOT_IN_FUNCTION_NAME = re.compile(r"[^a-zA-Z0-9_-]")
_DIGEST_CHARS = 8


class FunctionNames:
    """What the tools of one request are called in the API, which knows fewer names than contextd.

    A name that the API allows stays as it is. Any other gets its forbidden characters replaced and a
    digest appended; so no two tools have the same, and a tool has mostly the same in every request.
    """

    def __init__(self, request: ModelRequest) -> None:
        tools = [tool.name for tool in request.tools]
        tools += [call.name for message in request.history for call in message.calls]
        self._offers = {tool.name for tool in request.tools}
        self._tools = {name: name for name in tools if _FUNCTION_NAME.match(name)}
        self._functions: dict[str, str] = {name: name for name in self._tools}
        for name in tools:
            if name not in self._functions:
                self._functions[name] = self._free_name(name)
                self._tools[self._functions[name]] = name

    def function(self, tool: str) -> str:
        """The API's name of a tool of this request."""
        return self._functions[tool]

    def tool(self, function: str) -> str:
        """The tool that a model means by `function`: what it made up stays as it is."""
        return self._tools.get(function, function)

    def offered(self, function: str) -> bool:
        """Whether a function's name is that of a tool on offer."""
        return self.tool(function) in self._offers

    def begins(self, piece: str) -> bool:
        """Whether the name of a function on offer begins like this."""
        return any(self._functions[tool].startswith(piece) for tool in self._offers)

    def _free_name(self, tool: str) -> str:
        stem = _NOT_IN_FUNCTION_NAME.sub("_", tool)
        stem = stem[: FUNCTION_NAME_CHARS_MAX - _DIGEST_CHARS - 1]
        digest = tool
        while True:
            digest = _digest(digest)
            if (name := f"{stem}_{digest[:_DIGEST_CHARS]}") not in self._tools:
                return name


def tools(request: ModelRequest, names: FunctionNames) -> JsonObject:
    """The members of a request that say what may be called."""
    if request.tools:
        return {"tools": [_function(tool, names) for tool in request.tools]}
    called = {call.name: None for message in request.history for call in message.calls}
    if not called:
        return {}
    gone = [
        ToolOffer(name=name, description="Not available now.", parameters={}) for name in called
    ]
    return {"tools": [_function(tool, names) for tool in gone], "tool_choice": "none"}


def _function(tool: ToolOffer, names: FunctionNames) -> JsonObject:
    return {
        "type": "function",
        "function": {
            "name": names.function(tool.name),
            "description": tool.description,
            # Arguments are an object always; some servers refuse a schema that does not say so.
            "parameters": {"type": "object", "properties": {}} | tool.parameters,
        },
    }


def messages(request: ModelRequest, names: FunctionNames, model: str = "") -> list[JsonObject]:
    """`request` as Chat Completions messages, as said at the top of this module.

    `names` are those of the same request, `model` is the one that is asked.
    """
    ids = _CallIds()
    said = _said(request)
    first = next((one.role for one in said if one.role is not Role.SYSTEM), None)
    if first is Role.ASSISTANT:
        opening = _Said(Role.USER)
        opening.texts.append(OPENING)
        said.insert(1 if said[0].role is Role.SYSTEM else 0, opening)
    return [message for one in said for message in _messages(one, names, ids, model)]


class _Asked:
    """A call, and its result once it is found."""

    def __init__(self, call: HistoryCall) -> None:
        self.call = call
        self.result: str | None = None


class _Said:
    """What one role said in a row."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.texts: list[str] = []
        self.thinking: list[str] = []
        self.asked: list[_Asked] = []

    @property
    def is_answered(self) -> bool:
        return any(asked.result is not None for asked in self.asked)


def _said(request: ModelRequest) -> list[_Said]:
    said: list[_Said] = []
    system = _Said(Role.SYSTEM)
    system.texts += [request.system_prompt] if request.system_prompt else []
    unanswered: dict[str, _Asked] = {}  # by id; of one id that is used twice the newest
    for message in request.history:
        if message.role is Role.TOOL:
            if asked := unanswered.pop(message.call_id or "", None):
                asked.result = message.content
        elif message.role is Role.SYSTEM:
            system.texts += [message.content] if message.content else []
        elif message.content or message.calls:
            # What an assistant says after a result is an answer of its own.
            if not said or said[-1].role is not message.role or said[-1].is_answered:
                said.append(_Said(message.role))
            said[-1].texts += [message.content] if message.content else []
            said[-1].thinking += [message.thinking] if message.thinking else []
            said[-1].asked += (new := [_Asked(call) for call in message.calls])
            unanswered |= {asked.call.id: asked for asked in new}
    return [system, *said] if system.texts else said


def _messages(
    said: _Said, names: FunctionNames, ids: "_CallIds", model: str
) -> Iterator[JsonObject]:
    content = "\n\n".join(said.texts)
    if not said.asked:
        yield {"role": said.role.value, "content": content}
        return
    asked_by_id = [(ids.of(asked.call), asked) for asked in said.asked]
    calls = [_call(id_, asked.call, names, model) for id_, asked in asked_by_id]
    answer = {"role": said.role.value, "content": content or None, "tool_calls": calls}
    yield answer | _kept(said, model)
    for id_, asked in asked_by_id:
        result = NO_RESULT if asked.result is None else asked.result
        yield {"role": Role.TOOL.value, "tool_call_id": id_, "content": result}


def attach(facts: JsonObject, model: str) -> JsonObject:
    """What a call keeps of `facts`, so that only this model gets them back."""
    return {"model": model, **facts} if facts else {}


def _attached(call: HistoryCall, part: str, model: str) -> JsonObject:
    """A part of what came with a call, if it came from this model. Another provider's is none."""
    mine = call.attached.get("model") == model
    found = call.attached.get(part) if mine else None
    return found if isinstance(found, dict) else {}


def _kept(said: _Said, model: str) -> JsonObject:
    """What the answer as a whole gives back."""
    kept: JsonObject = {}
    for asked in said.asked:
        kept |= _attached(asked.call, "answer", model)
    field = kept.pop("reasoning_field", None)
    if isinstance(field, str) and said.thinking:
        kept[field] = "".join(said.thinking)
    return kept


def _call(id_: str, call: HistoryCall, names: FunctionNames, model: str) -> JsonObject:
    attached = _attached(call, "call", model)
    function = {"name": names.function(call.name), "arguments": _arguments(call.arguments)}
    function = {**attached.get("function", {}), **function}
    return {**attached, "id": id_, "type": "function", "function": function}


def _arguments(text: str) -> str:
    try:
        valid = isinstance(load_json(text), dict)
    except ValueError:
        valid = False
    return text if valid else json.dumps({INVALID_ARGUMENTS: text}, ensure_ascii=False)


class _CallIds:
    """Ids of calls as the API takes them, no two the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, call: HistoryCall) -> str:
        """The call's own where it can be, else one made of it."""
        id_ = call.id
        while not id_ or len(id_) > CALL_ID_CHARS_MAX or id_ in self._taken:
            id_ = f"call_{_digest(id_)[:32]}"
        self._taken.add(id_)
        return id_


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
