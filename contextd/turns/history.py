"""What of a conversation the model is shown (§6): a pure function over what the store has.

All that one reply wrote is one message of the model: text before, between and after its calls. The
results follow it at once, whatever was stored in between. Every call has a result, so the history is
well-formed for any model.
"""

from collections.abc import Mapping, Sequence

import msgspec

from contextd.core.message import FILE_REFERENCE, THINKING, Role
from contextd.core.tool_call import TOOL_CALL, TOOL_RESULT
from contextd.provider import HistoryCall, HistoryMessage
from contextd.store.history import Told
from contextd.store.stored import stored, stored_object
from contextd.store.tables import AnyRow

NO_RESULT = "The call was cancelled: it has no result."
STOPPED = "The call was stopped while it ran: it has no result, and may have had its effect or not."


def build_history(said: Sequence[Told], results: Mapping[int, str]) -> list[HistoryMessage]:
    """The messages in order; `results` has the texts of results by their messages' keys."""
    history: list[HistoryMessage] = []
    reply: list[Told] = []
    is_answered = False  # a reply's results are stored when all of it has been
    for one in said:
        if one.row.kind == TOOL_RESULT and "tool_call_id" in stored_object(one.row, "metadata"):
            is_answered = True  # the result itself follows its call
            continue
        if reply and (one.row.role != Role.ASSISTANT or is_answered or _begins_anew(reply, one)):
            history += _reply(reply, results)
            reply = []
        is_answered = False
        if one.row.role == Role.ASSISTANT:
            reply.append(one)
        elif one.row.kind == FILE_REFERENCE and one.row.role == Role.TOOL:
            # The text of a file is told by who refers to it.
            history.append(HistoryMessage(role=Role.USER, content=one.text))
        else:
            history.append(HistoryMessage(role=Role(one.row.role), content=one.text))
    return [*history, *_reply(reply, results)] if reply else history


def _begins_anew(reply: Sequence[Told], one: Told) -> bool:
    """Another turn's, or no turn's, or a call of another round: that is the next answer of the model."""
    if one.row.turn_id is None or reply[-1].row.turn_id != one.row.turn_id:
        return True
    rounds = {each.call.round for each in reply if each.call is not None}
    return one.call is not None and bool(rounds) and one.call.round not in rounds


def _reply(said: Sequence[Told], results: Mapping[int, str]) -> list[HistoryMessage]:
    calls = [one.call for one in said if one.call is not None]
    texts = (one.text for one in said if one.row.kind not in (TOOL_CALL, THINKING))
    return [
        HistoryMessage(
            role=Role.ASSISTANT,
            content="".join(texts),
            thinking="".join(one.text for one in said if calls and one.row.kind == THINKING),
            calls=[
                HistoryCall(
                    id=call.call_id,
                    name=call.name,
                    arguments=_arguments(call, said),
                    attached=stored(call, "attached", dict) or {},
                )
                for call in calls
            ],
        ),
        *(
            HistoryMessage(
                role=Role.TOOL,
                content=results.get(
                    call.result_message_key, STOPPED if call.started_at else NO_RESULT
                ),
                call_id=call.call_id,
                call_name=call.name,
            )
            for call in calls
        ),
    ]


def _arguments(call: AnyRow, said: Sequence[Told]) -> str:
    """As they were executed, which is not what the model wrote where a person edited them."""
    if call.arguments is not None:
        return msgspec.json.encode(call.arguments).decode()
    return next(one.text for one in said if one.call is call)
