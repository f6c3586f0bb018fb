"""`serve`: an option for every setting, made from the settings themselves."""

import gc
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import msgspec
import rich_click as click

from contextd.settings import NAMES, SECRETS, Settings, environment_name, load

DESCRIPTIONS = {
    "host": "The address to listen on.",
    "port": "The port to listen on; 0 takes a free one.",
    "allow_remote": "Serve other machines, without any authentication.",
    "allowed_hosts": "Host names to answer to, besides its own; comma-separated.",
    "cors_origins": "Browser origins to allow, instead of those on loopback; comma-separated.",
    "database": "Where contexts are kept: a URL of SQLAlchemy with an async driver.",
    "readers": "Database connections for reading.",
    "provider": "Who writes the answers where a context names nobody.",
    "model": "The model to ask where a context names none.",
    "system_prompt": "The system prompt where a context has none.",
    "scripted_rate": "Chunks a second of the scripted provider; 0 is as fast as it can.",
    "openai_base_url": "The address of a server that speaks the Chat Completions API.",
    "openai_api_key": "The key for that server.",
    "think_tags": "Take reasoning between <think> tags out of a model's text.",
    "token_timeout_s": "Seconds without a token or a sign of life after which an attempt has failed.",
    "keep_alive_timeout_s": "Seconds of nothing but signs of life after which an attempt has failed.",
    "turn_timeout_s": "Seconds of work after which a turn has failed.",
    "attempts_max": "Attempts at a turn whose errors may pass.",
    "backoff_initial_s": "Seconds before the second attempt; doubled for each one more.",
    "backoff_max_s": "The longest wait between two attempts, in seconds.",
    "lease_s": "Seconds until another process takes over a turn whose process is silent.",
    "context_tokens_max": "The most of a conversation that is sent to a model, in tokens; 0 is no limit.",
    "history_bytes_max": "The most of a conversation that is sent to a model, in bytes.",
    "queue_max": "Messages that may wait in one context.",
    "workspace": "The folder that the built-in tools read and write.",
    "tools": "A Python module with tools, as 'my_tools' or 'my_tools:toolset'.",
    "mcp_servers": "A JSON file that lists MCP servers.",
    "mcp_message_bytes_max": "The longest message that is taken of an MCP server.",
    "mcp_log_stderr": "Log what MCP servers write to standard error; it may quote people's words.",
    "workflows": "The folder of the workflows.",
    "file_bytes_max": "The most of one file that a model is shown, in bytes.",
    "tool_timeout_s": "Seconds after which a tool is stopped.",
    "waiting_timeout_s": "Seconds that a turn waits for people and external tools; 0 is no limit.",
    "tool_arguments_bytes_max": "The most that one call may have as arguments, in bytes.",
    "tool_result_bytes_max": "The most of a tool's result that is kept, in bytes.",
    "producer_silence_s": "Seconds after which a silent producer loses its message.",
    "batch_chunks_max": "Chunks of a producer in one request.",
    "line_bodies_max": "Bodies of lines that may be open at the same time.",
    "heartbeat_s": "Seconds of silence on a stream before a heartbeat is sent.",
    "throttle_ms": "The least time between two signals of growth of one message.",
    "slow_reader_s": "Seconds after which a reader that takes nothing is disconnected.",
    "reader_pending_max": "Messages that may wait for one reader before it is disconnected.",
    "streams_max": "Streams that may be open at the same time.",
    "poll_s": "Seconds between looks at what other processes have written.",
    "request_bytes_max": "The largest request, in bytes.",
    "json_bytes_max": "The most of a request beside its long texts, in bytes.",
    "chunk_bytes_max": "The largest chunk, in bytes of UTF-8.",
    "metadata_bytes_max": "The largest metadata of a context or a message, in bytes of JSON.",
    "pull_bytes_max": "The most text in one answer, in bytes.",
    "waiting_pulls_max": "Pulls that may wait for new text at the same time.",
    "writer_queue_max": "Writes that may wait for the database before requests are refused.",
    "tail_bytes_max": "Memory for the newest text, in bytes.",
    "connections_max": "Connections that may be open at the same time.",
    "head_bytes_max": "The largest head of a request, in bytes.",
    "head_timeout_s": "Seconds in which the head of a request has to come.",
    "body_timeout_s": "Seconds in which the body of a request has to come.",
    "keep_alive_s": "Seconds that a connection may wait for its next request.",
    "shutdown_s": "Seconds that open requests have to end when the server stops.",
    "log_level": "What is worth a line in the log.",
    "log_format": "How a line of the log looks.",
}

METAVARS: dict[type, str] = {int: "INTEGER", float: "NUMBER", tuple: "NAMES"}


def _metavar(field: msgspec.structs.FieldInfo) -> str:
    choices = get_args(field.type) if get_origin(field.type) is Literal else ()
    return "|".join(choices) or METAVARS.get(type(field.default), "TEXT")


def _option(field: msgspec.structs.FieldInfo) -> Callable[[Any], Any]:
    """Values stay text: `load` converts and checks them like those of the environment."""
    name = field.name.replace("_", "-")
    described = DESCRIPTIONS.get(field.name, "")  # a test keeps it complete
    if isinstance(field.default, bool):
        return click.option(f"--{name}/--no-{name}", default=None, help=described)
    default = "" if field.default in {None, ()} else f"  [default: {field.default}]"
    return click.option(f"--{name}", metavar=_metavar(field), help=described + default)


def _every_setting(command: Callable[..., int]) -> Callable[..., int]:
    """Secrets are left to the environment: command lines are there for all to see."""
    for field in reversed(msgspec.structs.fields(Settings)):
        if field.name not in SECRETS:
            command = _option(field)(command)
    return command


_SECRET_HELP = "; ".join(
    f"{environment_name(name)}: {DESCRIPTIONS[name]}" for name in NAMES if name in SECRETS
)


@click.command(
    epilog=f"Every option is also CONTEXTD_… in the environment. Only there: {_SECRET_HELP}"
)
@_every_setting
def serve(**given: Any) -> int:
    """Serve until SIGTERM or Ctrl-C. Upgrades its database first."""
    settings = load(overrides=given)
    gc.disable()  # what loads now stays, and looking through it takes a quarter of the time
    from contextd.app import run  # noqa: PLC0415 - the server's parts take a second to load

    return run(settings)
