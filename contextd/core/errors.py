"""What can go wrong, once each: every error has a permanent code and the facts named in §1.

HTTP statuses are not here: one table in `contextd.http.problems` maps codes to them.
"""

from typing import Any, ClassVar

import msgspec


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a request, and where."""

    field: str
    message: str


class ContextdError(Exception):
    """The root of all refusals. `facts` go to the client beside the code, so they hold no chat text."""

    code: ClassVar[str]
    title: ClassVar[str]
    index = 0  # which of several chunks was refused

    def __init__(self, detail: str, **facts: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.facts = facts


def defect_in(error: Exception) -> Exception | None:
    """What is worth a traceback in the log: not a refusal, such as that the database is away."""
    return None if isinstance(error, ContextdError) else error


class InvalidRequest(ContextdError):
    """The request is not of the form that the contract gives; `errors` names each field."""

    code = "invalid_request"
    title = "The request is not valid"

    def __init__(self, *errors: FieldError) -> None:
        detail = "; ".join(f"{error.field}: {error.message}" for error in errors)
        super().__init__(detail, errors=list(errors))

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidRequest":
        """The common case: one field is wrong."""
        return cls(FieldError(field=field, message=message))


class Forbidden(ContextdError):
    """The caller may not do this, or the request came from a host or origin that is not served."""

    code = "forbidden"
    title = "Not allowed"


class _Missing(ContextdError):
    noun: ClassVar[str]
    fact: ClassVar[str]

    def __init__(self, id_: str) -> None:
        super().__init__(f"There is no {self.noun} with this id here.", **{self.fact: id_})


class ContextNotFound(_Missing):
    """No context has this id, or it was deleted."""

    code, title, noun, fact = "context_not_found", "No such context", "context", "context_id"


class MessageNotFound(_Missing):
    """The context has no message with this id."""

    code, title, noun, fact = "message_not_found", "No such message", "message", "message_id"


class BranchNotFound(_Missing):
    """The context has no branch with this name."""

    code, title, noun, fact = "branch_not_found", "No such branch", "branch", "branch"


class TurnNotFound(_Missing):
    """The context has no turn with this id."""

    code, title, noun, fact = "turn_not_found", "No such turn", "turn", "turn_id"


class WorkflowNotFound(_Missing):
    """No workflow has this name."""

    code, title, noun, fact = "workflow_not_found", "No such workflow", "workflow", "workflow"


class ToolCallNotFound(_Missing):
    """The context has no tool call with this id."""

    code, title = "tool_call_not_found", "No such tool call"
    noun, fact = "tool call", "tool_call_id"


class ToolCallDecided(ContextdError):
    """The call was decided otherwise, or has its result already."""

    code = "tool_call_decided"
    title = "Decided already"

    def __init__(self, tool_call_id: str, status: str) -> None:
        detail = f"The tool call is {status} already."
        super().__init__(detail, tool_call_id=tool_call_id, tool_call_status=status)


class NotFound(ContextdError):
    """No such path."""

    code = "not_found"
    title = "Not found"


class MethodNotAllowed(ContextdError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    title = "Method not allowed"


class IdTaken(ContextdError):
    """The id belongs to something else; `deleted` says that it is a deleted context's."""

    code = "id_taken"
    title = "This id is taken"

    def __init__(self, id_: str, *, deleted: bool = False) -> None:
        facts: dict[str, Any] = {"id": id_}
        if deleted:
            facts["deleted"] = True
        what = "a deleted context" if deleted else "something with another content"
        super().__init__(f"This id belongs to {what}.", **facts)


class IllegalTransition(ContextdError):
    """The table has no such step from this state. Nothing was changed (§5)."""

    code = "illegal_transition"
    title = "Not possible in this state"

    def __init__(self, *, state: str, trigger: str, allowed: list[str], detail: str = "") -> None:
        detail = detail or f"'{trigger}' is not possible in state '{state}'."
        super().__init__(detail, state=state, trigger=trigger, allowed=allowed)


class ContextBusy(ContextdError):
    """A turn runs, and the request asked not to wait."""

    code = "context_busy"
    title = "The context is busy"

    def __init__(self, state: str) -> None:
        super().__init__(f"The context is busy: {state}.", state=state)


class BranchBusy(ContextBusy):
    """Something is, or is to be, written on the branch."""

    def __init__(self, state: str, branch: str) -> None:
        detail = "A turn runs or waits on this branch, or a message of it is open."
        ContextdError.__init__(self, detail, state=state, branch=branch)


class BranchActive(ContextdError):
    """The branch is the active one, which cannot be deleted (§9)."""

    code = "branch_active"
    title = "The branch is active"

    def __init__(self, branch: str) -> None:
        super().__init__("This is the active branch. Make another one active first.", branch=branch)


class MessageClosed(ContextdError):
    """The message is closed: no chunk can follow."""

    code = "message_closed"
    title = "The message is closed"

    def __init__(self, *, message_status: str, final_sequence: int) -> None:
        detail = f"The message is closed ({message_status}) at {final_sequence}."
        super().__init__(detail, message_status=message_status, final_sequence=final_sequence)


class StaleProducer(ContextdError):
    """Another owner has taken over; this one's writes are refused."""

    code = "stale_producer"
    title = "Another producer took over"

    def __init__(self, epoch: int) -> None:
        super().__init__(f"The message belongs to epoch {epoch} now.", epoch=epoch)


class SequenceGap(ContextdError):
    """Chunks are missing before this one, or before the end that was named."""

    code = "sequence_gap"
    title = "Chunks are missing"

    def __init__(self, expected_sequence: int) -> None:
        detail = f"The next chunk to be stored is {expected_sequence}."
        super().__init__(detail, expected_sequence=expected_sequence)


class SequenceConflict(ContextdError):
    """Another text is stored at this sequence, or chunks beyond the end that was named."""

    code = "sequence_conflict"
    title = "Something else is stored there"

    def __init__(self, sequence: int) -> None:
        super().__init__(f"Chunk {sequence} is stored with another text.", sequence=sequence)


class PayloadTooLarge(ContextdError):
    """The body, or a part of it, is larger than the limit."""

    code = "payload_too_large"
    title = "Too large"

    def __init__(self, limit_bytes: int, what: str = "") -> None:
        detail = f"The limit is {limit_bytes} bytes{what and ' for '}{what}."
        super().__init__(detail, limit_bytes=limit_bytes)


class HeadTooLarge(ContextdError):
    """The request's line and headers, or what frames its body, are larger than the limit."""

    code = "head_too_large"
    title = "The head is too large"

    def __init__(self, limit_bytes: int) -> None:
        detail = f"The limit is {limit_bytes} bytes for the request's line and headers."
        super().__init__(detail, limit_bytes=limit_bytes)


class TooManyChunks(PayloadTooLarge):
    """More chunks came in one batch than the limit."""

    def __init__(self, limit_chunks: int) -> None:
        detail = f"The limit is {limit_chunks} chunks in one request."
        ContextdError.__init__(self, detail, limit_chunks=limit_chunks)


class TooManyMessages(PayloadTooLarge):
    """More messages would be taken at once than the limit."""

    def __init__(self, limit_messages: int) -> None:
        detail = f"The limit is {limit_messages} messages at once."
        ContextdError.__init__(self, detail, limit_messages=limit_messages)


class UnsupportedMediaType(ContextdError):
    """The body's Content-Type is not one that this path reads."""

    code = "unsupported_media_type"
    title = "Unsupported media type"


class QueueFull(ContextdError):
    """As many messages are queued as the limit allows; try again when one has run."""

    code = "queue_full"
    title = "The queue is full"


class InternalError(ContextdError):
    """A defect. Details are in the log, never in the answer."""

    code = "internal_error"
    title = "Internal error"

    def __init__(self) -> None:
        super().__init__("Something went wrong on the server. Its log has the details.")


class Overloaded(ContextdError):
    """More work is waiting than the server takes on; nothing was done."""

    code = "overloaded"
    title = "Overloaded"


class ShuttingDown(ContextdError):
    """The server is stopping; nothing was done."""

    code = "shutting_down"
    title = "Shutting down"

    def __init__(self) -> None:
        super().__init__("The server is stopping. Try again in a moment.")
