"""The arguments of a call: from the model's text to values that fit the tool's JSON Schema (§8).

Theory of operation. A schema comes from whoever declares a tool, and the arguments from a model, so the
two together may be made to run for ever: a few nested `anyOf` take more steps than there is time, a
validator in native code cannot be interrupted and holds the interpreter's lock meanwhile, and what is
nested deeply enough overflows its stack. So checks run in one process of their own, started with the
first check. There each has a limit of processor time and of memory, which the system enforces by ending
the process; the next check starts another. One check runs at a time; the others wait for it.
"""

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import structlog

from contextd.core.values import SEQUENCE_MAX, JsonObject
from contextd.tools import ToolError
from contextd.tools.text import one_line

log = structlog.get_logger(__name__)

DEPTH_MAX = 64
SCHEMA_BYTES_MAX = 262_144
CHECK_CPU_S = 1.0
ANSWER_WAIT_S = 30.0  # for a machine that is busy; the limit proper is of processor time
ANSWER_BYTES_MAX = 65_536  # ten errors of 300 characters, escaped, are far less

_WORKER = Path(__file__).with_name("argument_worker.py")

_UNCHECKED = (
    "the arguments could not be checked against the tool's JSON Schema in the time there is"
)


class ArgumentsError(ToolError):
    """The text is no JSON object that a tool could be given; its words are for the model."""


def parse(text: str, *, bytes_max: int) -> JsonObject:
    """The arguments that a model wrote as `text`.

    Raises `ArgumentsError` for more than `bytes_max` bytes of UTF-8, for what is not JSON (`NaN` and
    `Infinity` are not) or not an object, for a name twice in one object, more than `DEPTH_MAX` levels,
    and strings that cannot be stored: with U+0000 or half of a surrogate pair.
    """
    if len(text) > bytes_max or len(text.encode(errors="surrogatepass")) > bytes_max:
        raise ArgumentsError(f"The arguments are larger than {bytes_max} bytes.")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ArgumentsError(f"The arguments {_TOO_DEEP}.") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise ArgumentsError(f"The arguments are not JSON: {error.msg} at {at}.") from None
    except ValueError as error:
        raise ArgumentsError(f"The arguments are not JSON: {one_line(str(error), 200)}.") from None
    if not isinstance(value, dict):
        raise ArgumentsError(f"The arguments have to be a JSON object, not {_kind(value)}.")
    if problem := _unfit(value):
        raise ArgumentsError(f"The arguments {problem}.")
    return value


class ArgumentChecker:
    """Checks arguments against JSON Schemas, in a process of its own. `close` ends it."""

    def __init__(self, *, cpu_s: float = CHECK_CPU_S) -> None:
        """`cpu_s`: how much of the processor one check may take, in seconds."""
        self._cpu_s = cpu_s
        self._turn = asyncio.Lock()
        self._worker: asyncio.subprocess.Process | None = None

    async def check(self, schema: JsonObject, arguments: JsonObject) -> list[str]:
        """What is wrong with `arguments`, in words for a model; empty when they fit.

        At most eleven errors of 300 characters, each with its place as a JSON Pointer, none with a value
        that was given. Arguments that could not be checked, because the schema is wrong or it took too
        long, count as wrong. The schema's own draft is followed, 2020-12 where it names none; nothing
        outside of it is fetched, and `format` is only a note.
        """
        problem = await self._check(schema, arguments)
        return [problem] if isinstance(problem, str) else problem

    async def check_schema(self, schema: JsonObject) -> list[str]:
        """What is wrong with `schema` itself, in words for whoever declares a tool."""
        problem = await self._check(schema, None)
        return [problem] if isinstance(problem, str) else problem

    async def close(self) -> None:
        """Ends the process. The next check would start another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            _kill(worker)
            await worker.wait()

    async def _check(self, schema: JsonObject, arguments: JsonObject | None) -> list[str] | str:
        if problem := _unfit(schema):
            return f"the values of the tool's JSON Schema {problem}"
        if arguments is not None and (problem := _unfit(arguments)):
            return f"the arguments {problem}"
        schema_line = _line(schema)
        if len(schema_line) > SCHEMA_BYTES_MAX:
            return f"the tool's JSON Schema is larger than {SCHEMA_BYTES_MAX} bytes"
        answer = await self._ask(schema_line + (b"\n" if arguments is None else _line(arguments)))
        if answer is None:
            return _UNCHECKED
        if answer.schema is not None:
            return f"the tool's JSON Schema is wrong: {answer.schema}"
        return answer.errors

    async def _ask(self, request: bytes) -> "_Answer | None":
        """None when the process did not live to answer."""
        async with self._turn:
            try:
                worker = await self._running()
                line = await asyncio.wait_for(_exchange(worker, request), ANSWER_WAIT_S)
                return msgspec.json.decode(line, type=_Answer)
            except (OSError, ValueError, TimeoutError) as error:
                # ValueError: it ended without an answer, or said more than any answer has.
                self._drop()
                log.warning("a check of arguments was given up", exception=type(error).__name__)
                return None
            except BaseException:  # cancelled: its answer would be taken for the next one's
                self._drop()
                raise

    async def _running(self) -> asyncio.subprocess.Process:
        if self._worker is not None and self._worker.returncode is not None:
            self._drop()
        if self._worker is None:
            # -P: neither this folder nor the current one, where tools may write, is searched for modules.
            self._worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                str(_WORKER),
                str(self._cpu_s),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # its last words could hold chat text
                limit=ANSWER_BYTES_MAX,
            )
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            _kill(worker)


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    errors: list[str] = []
    schema: str | None = None


async def _exchange(worker: asyncio.subprocess.Process, request: bytes) -> bytes:
    if worker.stdin is None or worker.stdout is None:
        raise ValueError("the process has no pipes")
    worker.stdin.write(request)
    await worker.stdin.drain()
    return await worker.stdout.readline()


def _kill(worker: asyncio.subprocess.Process) -> None:
    if worker.returncode is None:
        worker.kill()
    if worker.stdin is not None:
        worker.stdin.close()


def _line(value: JsonObject) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


_TOO_DEEP = f"are nested more than {DEPTH_MAX} levels deep"


def _unfit(value: Any) -> str:
    """Why a JSON value cannot be stored or checked; empty when it can. Not recursive: it may be deep."""
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following += item.keys()
                following += item.values()
            elif isinstance(item, list):
                following += item
            elif problem := _unfit_scalar(item):
                return problem
        if not following:
            return ""
        level = following
    return _TOO_DEEP


def _unfit_scalar(value: Any) -> str:
    match value:
        case str():
            if "\x00" in value:
                return "hold the character U+0000, which cannot be stored"
            try:
                value.encode()
            except UnicodeEncodeError:
                return "hold half of a surrogate pair, which is no character"
        case float():
            if not math.isfinite(value):
                return "hold a number that is not finite"
        case int() | None:
            pass
        case _:
            return f"hold a value of type {type(value).__name__}, which is not JSON"
    return ""


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    raise ValueError(f"the name {json.dumps(one_line(twice, 80))} is twice in one object")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def _finite(digits: str) -> float | int:
    """A number with a fraction. A whole one, such as `1.0`, is an integer for JSON Schema, so here too."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {one_line(digits, 40)} is too large")
    is_whole = number.is_integer() and abs(number) <= SEQUENCE_MAX
    return int(number) if is_whole else number


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case _:
            return "an array"
