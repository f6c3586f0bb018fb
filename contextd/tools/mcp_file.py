"""The file that lists MCP servers: what each is, how it is reached, and how far its tools are trusted.

    {"mcpServers": {
      "files": {"command": "files-server", "args": ["/srv"], "env": {"TOKEN": "${FILES_TOKEN}"}},
      "search": {"url": "https://search.example/mcp", "headers": {"Authorization": "Bearer ${KEY}"}}
    }}

Beside these an entry may have `type` (`stdio` or `http`, where it says what the rest says too), `cwd`,
`requires_approval` (true, false, or the names of those that do), `idempotent` (names), `tools` (names:
no others are offered) and `timeout_s`. Names of tools are those that the server gives them.

`${NAME}` in any of its texts stands for a variable of contextd's environment, which must be set. What
it stood for is a secret from then on: it is in no error, no log and no repr.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Meta

from contextd.settings import SettingsError

FILE_BYTES_MAX = 1024 * 1024
SERVERS_MAX = 64
SECRET_CHARS_MIN = 4  # shorter ones cannot be told from ordinary text

# What names of tools are made of (`mcp_naming.py`), so no "__" and no "_" at an end.
_SERVER_NAME = re.compile(r"(?!.*__)[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_SERVER_NAME_CHARS_MAX = 32
_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

ToolNames: TypeAlias = tuple[str, ...]


class _Fields(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is, in the file as well as with its variables put in."""

    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    url: str | None = None
    headers: dict[str, str] = {}
    requires_approval: bool | ToolNames | None = None
    idempotent: ToolNames = ()
    tools: ToolNames | None = None


class McpServer(_Fields, frozen=True, kw_only=True):
    """One server, with every variable put in. Either `command` or `url` is set, never both.

    `env` is added to the few variables that a child inherits. `requires_approval` is None where the
    server's own hints decide. `tools` is None where all are offered. `timeout_s` bounds each call in
    addition to the caller's own bound. `secrets` must be shown to no one.
    """

    name: str
    timeout_s: float | None = None
    secrets: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"McpServer(name={self.name!r})"

    def __rich_repr__(self) -> Any:
        yield "name", self.name

    def conceal(self, text: str) -> str:
        """`text` without this server's secrets."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


class _Entry(_Fields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server as the file has it."""

    type: str | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    servers: dict[str, msgspec.Raw] = msgspec.field(name="mcpServers")


class _Invalid(Exception):
    """What is wrong with one entry, without saying which."""


def read_mcp_file(path: Path, environ: Mapping[str, str] = os.environ) -> list[McpServer]:
    """The servers of the file, in its order.

    Raises `SettingsError`, on one line that names the file, the server and the field: the file cannot
    be read, is no JSON, has an unknown field or a value of the wrong kind; an entry has both a command
    and a URL, or neither; a variable is not set; a name is not allowed.
    """
    try:
        file = msgspec.json.decode(_read(path), type=_File)
        if len(file.servers) > SERVERS_MAX:
            raise _Invalid(f"lists more than {SERVERS_MAX} servers")
        return [_server(name, raw, environ) for name, raw in file.servers.items()]
    except (_Invalid, msgspec.MsgspecError) as error:
        raise SettingsError(f"The file of MCP servers {path}: {_one_line(error)}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _Invalid(f"cannot be read: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise _Invalid(f"is longer than {FILE_BYTES_MAX} bytes")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _server(name: str, raw: msgspec.Raw, environ: Mapping[str, str]) -> McpServer:
    try:
        _check_name(name)
        entry = msgspec.json.decode(raw, type=_Entry)
        _check_kind(entry)
        return _expand(name, entry, environ)
    except (_Invalid, msgspec.MsgspecError) as error:
        raise _Invalid(f"server {name!r}: {_one_line(error)}") from None


def _check_name(name: str) -> None:
    if not _SERVER_NAME.fullmatch(name) or len(name) > _SERVER_NAME_CHARS_MAX:
        raise _Invalid(
            f"a name is 1 to {_SERVER_NAME_CHARS_MAX} of A-Z a-z 0-9 _ -, with a letter or digit at "
            "both ends and no '__'"
        )


def _check_kind(entry: _Entry) -> None:
    """It is one kind of server, and has no field of the other."""
    if entry.command is not None and entry.url is not None:
        raise _Invalid("has both `command` and `url`")
    if not entry.command and not entry.url:
        raise _Invalid("needs a `command` or a `url`")
    kind = "stdio" if entry.command else "http"
    if entry.type is not None and entry.type not in _TYPES[kind]:
        known = " or ".join(f"`{name}`" for name in _TYPES[kind])
        raise _Invalid(f"`type` must be {known} for a server with a `{_REACHED_BY[kind]}`")
    foreign = [name for name in _FOREIGN[kind] if getattr(entry, name)]
    if foreign:
        raise _Invalid(f"`{foreign[0]}` does not belong to a server with a `{_REACHED_BY[kind]}`")


_REACHED_BY = {"stdio": "command", "http": "url"}
_TYPES = {"stdio": ("stdio",), "http": ("http", "streamable-http")}
_FOREIGN = {"stdio": ("headers",), "http": ("args", "env", "cwd")}


def _expand(name: str, entry: _Entry, environ: Mapping[str, str]) -> McpServer:
    texts = _Texts(environ)
    server = McpServer(
        name=name,
        command=texts.optional("command", entry.command),
        args=tuple(texts.expand("args", arg) for arg in entry.args),
        env=texts.values("env", entry.env),
        cwd=texts.optional("cwd", entry.cwd),
        url=texts.optional("url", entry.url),
        headers=texts.values("headers", entry.headers),
        requires_approval=entry.requires_approval,
        idempotent=entry.idempotent,
        tools=entry.tools,
        timeout_s=entry.timeout_s,
        secrets=frozenset(texts.secrets),
    )
    _check_texts(server)
    return server


class _Texts:
    """Puts variables into texts, and remembers what they stood for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.secrets: set[str] = set()

    def expand(self, field: str, text: str) -> str:
        if "\0" in text:
            raise _Invalid(f"`{field}` holds U+0000")
        return _VARIABLE.sub(lambda found: self._value(field, found), text)

    def optional(self, field: str, text: str | None) -> str | None:
        return None if text is None else self.expand(field, text)

    def values(self, field: str, texts: dict[str, str]) -> dict[str, str]:
        return {name: self.expand(f"{field}.{name}", text) for name, text in texts.items()}

    def _value(self, field: str, found: re.Match[str]) -> str:
        name = found[1]
        if not found[0].endswith("}") or not _VARIABLE_NAME.fullmatch(name):
            raise _Invalid(f"`{field}`: a variable is written ${{NAME}}")
        if name not in self._environ:
            raise _Invalid(f"`{field}` names the environment variable {name}, which is not set")
        value = self._environ[name]
        self.secrets.update(form for form in _forms(value) if len(form) >= SECRET_CHARS_MIN)
        return value


def _forms(secret: str) -> list[str]:
    """How it may come back in somebody's words: whole, a line of it, or as part of a URL."""
    return [secret, *(line.strip() for line in secret.splitlines()), quote(secret, safe="")]


def _check_texts(server: McpServer) -> None:
    """What could only be seen with the variables put in. The messages hold no value."""
    if server.url is not None and not _is_url(server.url):
        raise _Invalid("`url` must be a URL of http or https")
    for name in server.env:
        if not name or "=" in name or "\0" in name:
            raise _Invalid("`env` has a name that no variable can have")
    for name, value in server.headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise _Invalid("`headers` has a name that no header can have")
        if not re.fullmatch(r"[\t\x20-\x7e]*", value):
            raise _Invalid(f"`headers.{name}` has a character that no header can have")


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
