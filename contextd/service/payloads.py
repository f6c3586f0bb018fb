"""What a send may consist of, made into a message: text, references to files, workflows (§3.1)."""

from collections.abc import Callable, Sequence
from typing import TypeVar, assert_never

import msgspec

from contextd.core.errors import InvalidRequest, Overloaded
from contextd.core.message import (
    FILE_REFERENCE,
    TEXT,
    WORKFLOW,
    FileReferencePayload,
    Payload,
    TextPayload,
    WorkflowPayload,
)
from contextd.core.values import JsonObject
from contextd.service.steps import Steps
from contextd.store.notices import StartedTurn
from contextd.tools.files import file_reference_text, parse_file_reference
from contextd.tools.threads import ThreadsExhaustedError, in_thread
from contextd.tools.workspace import Workspace, WorkspaceError
from contextd.workflows import Workflows

T = TypeVar("T")


class Composed(msgspec.Struct, frozen=True, kw_only=True):
    """A user's message as it is stored."""

    kind: str
    content: str
    metadata: JsonObject


class Payloads:
    """Checks payloads, and reads what they refer to. `bytes_max` bounds what is shown of one file."""

    def __init__(
        self, steps: Steps, *, workspace: Workspace | None, workflows: Workflows, bytes_max: int
    ) -> None:
        self._steps = steps
        self._workspace = workspace
        self._workflows = workflows
        self._bytes_max = bytes_max

    async def compose(self, payload: Payload) -> Composed:
        """The message of a payload. Raises `InvalidRequest`, `WorkflowNotFound`."""
        match payload:
            case TextPayload():
                return Composed(
                    kind=TEXT, content=payload.content, metadata=_display(payload.display)
                )
            case FileReferencePayload():
                await self._check_files(payload.paths)
                return Composed(
                    kind=FILE_REFERENCE,
                    content=payload.display_text or "\n".join(payload.paths),
                    metadata={"paths": payload.paths, **_display(payload.display_text)},
                )
            case WorkflowPayload():
                return await self._render(payload)
            case _:
                assert_never(payload)

    async def attach(self, turn: StartedTurn, paths: Sequence[str]) -> None:
        """Stores what the files of a message hold now, as results that the model sees (§3.1)."""
        await self._steps.add_references(turn, await self.read(paths))

    async def read(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Each path with what a model is shown of the file as it is now."""
        if self._workspace is None:
            return [(path, f"{path}: this server has no workspace.") for path in paths]
        return [
            (path, await file_reference_text(self._workspace, path, bytes_max=self._bytes_max))
            for path in paths
        ]

    async def _check_files(self, paths: list[str]) -> None:
        workspace = self._workspace
        if workspace is None:
            raise InvalidRequest.of("payload.type", "this server has no workspace to refer to")
        for index, path in enumerate(paths):
            try:
                found = parse_file_reference(path)
                await off_loop(
                    lambda found=found: workspace.read(  # type: ignore[misc]
                        found.path,
                        first_line=found.first_line,
                        last_line=found.last_line,
                        bytes_max=1,
                    )
                )
            except WorkspaceError as error:
                raise InvalidRequest.of(f"payload.paths[{index}]", str(error)) from None

    async def _render(self, payload: WorkflowPayload) -> Composed:
        content = await off_loop(
            lambda: self._workflows.render(payload.workflow, payload.parameters)
        )
        metadata = {"workflow": payload.workflow, "parameters": payload.parameters}
        return Composed(
            kind=WORKFLOW, content=content, metadata=metadata | _display(payload.display_text)
        )


async def off_loop(work: Callable[[], T]) -> T:
    """Runs what blocks in a thread. Raises `Overloaded` when all are taken."""
    try:
        return await in_thread(work)
    except ThreadsExhaustedError:
        raise Overloaded(
            "More tools and files are being worked on than the server takes on."
        ) from None


def _display(display: str | None) -> JsonObject:
    return {"display": display} if display else {}
