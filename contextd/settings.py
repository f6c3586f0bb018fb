"""Every setting, its default and its range. Read once from `CONTEXTD_*`, then frozen (§12)."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta


class SettingsError(Exception):
    """A setting is missing, unknown or out of range; the message names it and fits on one line."""


Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86_400)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=10_000_000)]
Bytes: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Names: TypeAlias = tuple[str, ...]

ENVIRONMENT_PREFIX = "CONTEXTD_"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator can set. Field `port` is `--port` and `CONTEXTD_PORT`; lists are comma-separated.

    docs/running.md explains each; a test keeps it complete.
    """

    # Where it listens, and whom it answers (§11).
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8600
    allow_remote: bool = False
    allowed_hosts: Names = ()
    cors_origins: Names = ()

    # Where it keeps things.
    database: str = "sqlite+aiosqlite:///contextd.db"
    readers: Annotated[int, Meta(ge=1, le=64)] = 4

    # Who writes the answers (§6).
    provider: Literal["scripted", "openai"] = "scripted"
    model: str | None = None
    system_prompt: str | None = None
    scripted_rate: Annotated[float, Meta(ge=0, le=1_000_000)] = 50.0
    openai_base_url: str | None = None
    openai_api_key: str | None = None
    think_tags: bool = True

    # Turns (§6).
    token_timeout_s: Seconds = 60.0
    keep_alive_timeout_s: Seconds = 240.0
    turn_timeout_s: Seconds = 300.0
    attempts_max: Annotated[int, Meta(ge=1, le=100)] = 4
    backoff_initial_s: Annotated[float, Meta(ge=0, le=3600)] = 0.5
    backoff_max_s: Annotated[float, Meta(ge=0, le=3600)] = 20.0
    lease_s: Annotated[float, Meta(ge=1, le=3600)] = 15.0
    context_tokens_max: Annotated[int, Meta(ge=0, le=100_000_000)] = 0
    history_bytes_max: Bytes = 4 * 1024 * 1024
    queue_max: Annotated[int, Meta(ge=1, le=10_000)] = 100

    # Tools (§8).
    workspace: str | None = None
    tools: str | None = None
    mcp_servers: str | None = None
    mcp_message_bytes_max: Annotated[int, Meta(ge=1024, le=2**31 - 1)] = 4 * 1024 * 1024
    mcp_log_stderr: bool = False
    workflows: str | None = None
    file_bytes_max: Bytes = 64 * 1024
    tool_timeout_s: Seconds = 30.0
    waiting_timeout_s: Annotated[float, Meta(ge=0, le=31_536_000)] = 0
    tool_arguments_bytes_max: Bytes = 256 * 1024
    tool_result_bytes_max: Bytes = 256 * 1024

    # Producers (§7).
    producer_silence_s: Annotated[float, Meta(ge=0.1, le=31_536_000)] = 120.0
    batch_chunks_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    line_bodies_max: Count = 1000

    # Signals (§4).
    heartbeat_s: Annotated[float, Meta(ge=5, le=60)] = 15.0
    throttle_ms: Annotated[int, Meta(ge=0, le=1000)] = 100
    slow_reader_s: Seconds = 30.0
    reader_pending_max: Count = 10_000
    streams_max: Count = 20_000
    poll_s: Annotated[float, Meta(ge=0.05, le=3600)] = 1.0

    # Limits of requests and answers (§3.3, §7).
    request_bytes_max: Bytes = 10 * 1024 * 1024
    json_bytes_max: Bytes = 512 * 1024
    chunk_bytes_max: Bytes = 64 * 1024
    metadata_bytes_max: Bytes = 64 * 1024
    pull_bytes_max: Bytes = 1024 * 1024
    waiting_pulls_max: Count = 10_000
    writer_queue_max: Count = 20_000
    tail_bytes_max: Bytes = 64 * 1024 * 1024

    # Limits of connections (§1).
    connections_max: Count = 30_000
    head_bytes_max: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = 32 * 1024
    head_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    keep_alive_s: Seconds = 75.0

    # How it runs.
    shutdown_s: Annotated[float, Meta(ge=0.1, le=60)] = 2.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    def __repr__(self) -> str:
        """Names and values, but for secrets: a key must not reach a log by way of a repr."""
        shown = (
            f"{name}={'…' if name in SECRETS and value else repr(value)}"
            for name, value in msgspec.structs.asdict(self).items()
        )
        return f"Settings({', '.join(shown)})"


SECRETS = frozenset({"openai_api_key"})
NAMES: tuple[str, ...] = tuple(Settings.__struct_fields__)


def environment_name(name: str) -> str:
    """The environment variable of setting `name`."""
    return ENVIRONMENT_PREFIX + name.upper()


def load(
    environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from `CONTEXTD_*` in `environ` (default: the process's), `overrides` before them.

    An empty variable counts as unset. Raises `SettingsError` naming the variable that is wrong.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name in NAMES:
        raw = environ.get(environment_name(name))
        if raw:
            values[name] = raw
    values.update({k: v for k, v in (overrides or {}).items() if v is not None})
    for field in msgspec.structs.fields(Settings):
        if field.type == Names and isinstance(values.get(field.name), str):
            values[field.name] = [
                part.strip() for part in values[field.name].split(",") if part.strip()
            ]
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(str(error), values)) from None


def _explain(message: str, values: Mapping[str, Any]) -> str:
    """msgspec says `Expected … - at `$.port``; say it with the variable's name and its value."""
    what, _, where = message.partition(" - at `$.")
    name = where.rstrip("`").partition("[")[0]
    if not name:
        return message
    shown = "" if name in SECRETS else f" (got {values.get(name)!r})"
    option = "" if name in SECRETS else f" or --{name.replace('_', '-')}"
    return f"{environment_name(name)}{option}: {what}{shown}"
