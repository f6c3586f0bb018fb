"""Workflows: prompts in files that a client sends by name, with parameters (§3.1).

Blocking and short: a look at the folder for each call, and at most a second of rendering. Safe to
call from several threads at once.
"""

import builtins
import time
from pathlib import Path

import msgspec
import structlog

from contextd.core.errors import InvalidRequest, WorkflowNotFound
from contextd.core.values import JsonObject
from contextd.core.workflow import Workflow
from contextd.workflows import folder as files
from contextd.workflows.front_matter import BrokenWorkflow, parse
from contextd.workflows.parameters import check_parameters
from contextd.workflows.template import Clock, Template, TemplateStopped

log = structlog.get_logger(__name__)

FIELD = "payload.workflow"


class _Loaded(msgspec.Struct, frozen=True, kw_only=True):
    stamp: files.Stamp
    workflow: Workflow
    template: Template | None  # null where the workflow is broken


class Workflows:
    """The workflows of a folder, as its files are now. Without a folder there are none.

    `<name>.md` is the workflow `<name>`. A file that cannot be used is listed with its `error` and
    does the others no harm.
    """

    def __init__(self, folder: Path | None, *, clock_s: Clock = time.monotonic) -> None:
        self._folder = folder
        self._clock_s = clock_s
        self._loaded: dict[str, _Loaded] = {}

    def list(self) -> builtins.list[Workflow]:
        """All, by name; at most 1,000."""
        return [each.workflow for each in self._current().values()]

    def get(self, name: str) -> Workflow:
        """Raises `WorkflowNotFound`."""
        return self._named(name).workflow

    def render(self, name: str, parameters: JsonObject) -> str:
        """The text that `name` makes of `parameters`: not empty, without U+0000.

        Raises `WorkflowNotFound`, and `InvalidRequest` with each wrong parameter
        (`payload.parameters.<name>`), or with `payload.workflow` where the workflow itself fails.
        """
        loaded = self._named(name)
        if loaded.template is None:
            raise InvalidRequest.of(FIELD, f"is broken: {loaded.workflow.error}")
        values = check_parameters(loaded.workflow, parameters)
        return _rendered(name, loaded.template, values, self._clock_s)

    def _named(self, name: str) -> _Loaded:
        loaded = self._current().get(name)
        if loaded is None:
            raise WorkflowNotFound(name)
        return loaded

    def _current(self) -> dict[str, _Loaded]:
        """What the folder holds now; only files that changed are read again."""
        known = self._loaded
        found = files.find(self._folder) if self._folder is not None else {}
        current = {}
        for name, (path, stamp) in found.items():
            old = known.get(name)
            unchanged = old is not None and old.stamp == stamp
            current[name] = old if old and unchanged else _load(name, path, stamp)
        self._loaded = current
        return current


def _load(name: str, path: Path, stamp: files.Stamp) -> _Loaded:
    try:
        source = parse(name, files.read(path))
        names = [parameter.name for parameter in source.workflow.parameters]
        template = Template(source.body, names, source.body_line)
    except (files.UnreadableFile, BrokenWorkflow) as error:
        log.warning("a workflow is broken", workflow=name, error=str(error))
        broken = Workflow(name=name, title=name, description="", parameters=[], error=str(error))
        return _Loaded(stamp=stamp, workflow=broken, template=None)
    return _Loaded(stamp=stamp, workflow=source.workflow, template=template)


def _rendered(name: str, template: Template, values: JsonObject, clock_s: Clock) -> str:
    try:
        text = template.render(values, clock_s)
        text.encode()  # an escape in a body could make half a surrogate pair
    except TemplateStopped as error:
        raise InvalidRequest.of(FIELD, f"was stopped: {error}") from error
    except Exception as error:
        # An expression may raise anything. Its words can hold a parameter's text: they stay here.
        kind = type(error).__name__
        log.warning("a workflow failed", workflow=name, kind=kind)
        words = f"cannot be rendered with these parameters ({kind})"
        raise InvalidRequest.of(FIELD, words) from error
    if not text.strip() or "\0" in text:
        raise InvalidRequest.of(FIELD, "makes no text of these parameters")
    return text
