"""The process in which arguments are checked. `contextd.tools.arguments` starts it and says why.

A request is two lines of JSON, a schema and the arguments; without arguments the schema alone is
checked. The answer is one line: `{"schema": words}` where the schema is wrong, else `{"errors": [words]}`.
Only what is needed is imported, not even contextd, so that it starts at once.
"""

import functools
import json
import resource
import signal
import sys
from contextlib import suppress
from itertools import islice
from typing import Any, NoReturn

import jsonschema_rs

SCHEMAS_KEPT = 128
ERRORS_MAX = 10
ERROR_CHARS_MAX = 300
BRANCHES_SHOWN = 4
ALL_ERRORS_BYTES_MAX = 16_384  # all errors are made at once: of larger arguments only the first
MEMORY_BYTES_MAX = 2**30


def main(cpu_s: float) -> None:
    """Answers until its input ends. A check that takes more than `cpu_s` of the processor ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server, which closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever native code runs
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold chat text
    for schema in sys.stdin.buffer:
        arguments = sys.stdin.buffer.readline()
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = json.dumps(_answer(schema, arguments))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _answer(schema: bytes, arguments: bytes) -> dict[str, Any]:
    try:
        validator = _compile(schema)
    except (ValueError, RecursionError) as error:
        return {"schema": _words(error)}
    if not arguments.strip():
        return {"errors": []}
    value = json.loads(arguments)
    if validator.is_valid(value):
        return {"errors": []}
    if len(arguments) > ALL_ERRORS_BYTES_MAX:
        return {"errors": [_first(validator, value)]}
    found = validator.iter_errors(value)
    errors = [_words(error) for error in islice(found, ERRORS_MAX)]
    rest = sum(1 for _ in found)
    return {"errors": [*errors, f"and {rest} more"] if rest else errors}


@functools.lru_cache(SCHEMAS_KEPT)
def _compile(schema: bytes) -> Any:
    # The mask keeps values out of the words: they may be long, and the model knows what it wrote.
    return jsonschema_rs.validator_for(json.loads(schema), mask="value", retriever=_refuse)


def _refuse(_uri: str) -> NoReturn:
    raise ValueError("nothing outside of the schema is fetched")


def _first(validator: Any, value: Any) -> str:
    try:
        validator.validate(value)
    except jsonschema_rs.ValidationError as error:
        return _words(error)
    return "invalid"


def _words(error: Any) -> str:
    """One error as `/where/0: what`, short and on one line."""
    message = str(getattr(error, "message", error))
    branches = getattr(getattr(error, "kind", None), "context", None) or ()
    inner = [str(branch[0].message) for branch in islice(branches, BRANCHES_SHOWN) if branch]
    path = "".join(f"/{part}" for part in getattr(error, "instance_path", ()))
    head = f"{_short(path, ERROR_CHARS_MAX // 3)}: " if path else ""
    tail = f" ({'; '.join(_short(words, 100) for words in inner)})" if inner else ""
    return _short(f"{head}{_short(message, 200)}{tail}", ERROR_CHARS_MAX)


def _short(text: str, chars_max: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= chars_max else f"{line[: chars_max - 1]}…"


if __name__ == "__main__":
    main(float(sys.argv[1]))
