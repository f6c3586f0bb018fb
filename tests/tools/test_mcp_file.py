"""The file of MCP servers: what it may say, what it must not, and where its secrets are not seen."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.pretty import pretty_repr

from contextd.settings import SettingsError
from contextd.tools.mcp_file import FILE_BYTES_MAX, SERVERS_MAX, McpServer, read_mcp_file


def read(tmp_path: Path, content: object, **environ: str) -> list[McpServer]:
    path = tmp_path / "mcp.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_mcp_file(path, environ)


def read_one(tmp_path: Path, entry: dict[str, Any], **environ: str) -> McpServer:
    [server] = read(tmp_path, {"mcpServers": {"s": entry}}, **environ)
    return server


def refusal(tmp_path: Path, content: object, **environ: str) -> str:
    """What is wrong with the file, without the words before it."""
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, content, **environ)
    message = str(caught.value)
    prefix = f"The file of MCP servers {tmp_path / 'mcp.json'}: "
    assert message.startswith(prefix)
    assert "\n" not in message
    return message.removeprefix(prefix)


def test_servers_come_in_the_files_order(tmp_path: Path) -> None:
    """Either kind, each with all that it may have."""
    first = {
        "type": "stdio",
        "command": "run",
        "args": ["a", "b"],
        "env": {"X": "1"},
        "cwd": "/tmp",
        "requires_approval": ["write"],
        "idempotent": ["write"],
        "tools": ["read", "write"],
        "timeout_s": 5,
    }
    second = {"type": "http", "url": "http://localhost:1/mcp", "headers": {"A": "b"}}
    assert read(tmp_path, {"mcpServers": {"one": first, "two": second}}) == [
        McpServer(
            name="one",
            command="run",
            args=("a", "b"),
            env={"X": "1"},
            cwd="/tmp",
            requires_approval=("write",),
            idempotent=("write",),
            tools=("read", "write"),
            timeout_s=5.0,
        ),
        McpServer(name="two", url="http://localhost:1/mcp", headers={"A": "b"}),
    ]


def test_a_file_may_list_nothing(tmp_path: Path) -> None:
    """No servers are no error."""
    assert read(tmp_path, {"mcpServers": {}}) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Input data was truncated"),
        ("[]", "Expected `object`, got `array`"),
        ({}, "Object missing required field `mcpServers`"),
        ({"mcpServers": {}, "x": 1}, "Object contains unknown field `x`"),
        ({"mcpServers": []}, "Expected `object`, got `array` - at `$.mcpServers`"),
        (" " * (FILE_BYTES_MAX + 1), f"is longer than {FILE_BYTES_MAX} bytes"),
        (
            {"mcpServers": {f"s{number}": {"command": "c"} for number in range(SERVERS_MAX + 1)}},
            f"lists more than {SERVERS_MAX} servers",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    """With the file's path, on one line."""
    assert refusal(tmp_path, content) == message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """And named."""
    with pytest.raises(SettingsError, match=r"none\.json: cannot be read: No such file"):
        read_mcp_file(tmp_path / "none.json", {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"command": "c", "url": "http://h"}, "has both `command` and `url`"),
        ({}, "needs a `command` or a `url`"),
        ({"command": ""}, "needs a `command` or a `url`"),
        ({"command": "c", "shell": True}, "Object contains unknown field `shell`"),
        ({"command": 1}, "Expected `str | null`, got `int` - at `$.command`"),
        ({"command": "c", "args": "x"}, "Expected `array`, got `str` - at `$.args`"),
        ({"command": "c", "timeout_s": 0}, "Expected `float` > 0.0 - at `$.timeout_s`"),
        ({"command": "c", "type": "http"}, "`type` must be `stdio` for a server with a `command`"),
        (
            {"url": "http://h", "type": "sse"},
            "`type` must be `http` or `streamable-http` for a server with a `url`",
        ),
        (
            {"command": "c", "headers": {"a": "b"}},
            "`headers` does not belong to a server with a `command`",
        ),
        ({"url": "http://h", "args": ["b"]}, "`args` does not belong to a server with a `url`"),
        ({"url": "ftp://h"}, "`url` must be a URL of http or https"),
        ({"url": "http://h:x"}, "`url` must be a URL of http or https"),
        ({"url": "/mcp"}, "`url` must be a URL of http or https"),
        (
            {"url": "http://h", "headers": {"a b": "c"}},
            "`headers` has a name that no header can have",
        ),
        (
            {"url": "http://h", "headers": {"A": "b\nc"}},
            "`headers.A` has a character that no header can have",
        ),
        ({"command": "c", "env": {"A=B": "c"}}, "`env` has a name that no variable can have"),
        ({"command": "c\0"}, "`command` holds U+0000"),
        (
            {"command": "c", "env": {"A": "${GONE}"}},
            "`env.A` names the environment variable GONE, which is not set",
        ),
        ({"command": "c", "args": ["${}"]}, "`args`: a variable is written ${NAME}"),
        ({"command": "c", "args": ["${A:-b}"]}, "`args`: a variable is written ${NAME}"),
        ({"command": "c", "args": ["x${A"]}, "`args`: a variable is written ${NAME}"),
    ],
)
def test_what_is_no_server_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    """With the server's name and the field."""
    refused = refusal(tmp_path, {"mcpServers": {"s": entry}}, A="a")
    assert refused == f"server 's': {message}"


@pytest.mark.parametrize("name", ["a", "my-files", "my_files", "A1", "a--b", "x" * 32])
def test_names_that_servers_may_have(tmp_path: Path, name: str) -> None:
    """Those that can begin a tool's name."""
    assert read(tmp_path, {"mcpServers": {name: {"command": "c"}}})[0].name == name


@pytest.mark.parametrize("name", ["", "a__b", "_a", "a_", "-a", "a.b", "a b", "ä", "a\n", "x" * 33])
def test_names_that_servers_may_not_have(tmp_path: Path, name: str) -> None:
    """Two underscores end a server's name in that of a tool."""
    refused = refusal(tmp_path, {"mcpServers": {name: {"command": "c"}}})
    assert "a name is 1 to 32 of" in refused


def test_variables_are_put_in_everywhere(tmp_path: Path) -> None:
    """Also several in one text; what has only a dollar stays as it is."""
    entry = {
        "command": "${DIR}/run",
        "args": ["--token=${TOKEN}${TOKEN}", "$TOKEN", "$1"],
        "env": {"T": "${TOKEN}"},
        "cwd": "${DIR}",
    }
    server = read_one(tmp_path, entry, DIR="/opt/x", TOKEN="s3cret")
    assert server.command == "/opt/x/run"
    assert server.args == ("--token=s3crets3cret", "$TOKEN", "$1")
    assert server.env == {"T": "s3cret"}
    assert server.cwd == "/opt/x"
    entry = {"url": "https://h/${TOKEN}", "headers": {"Authorization": "Bearer ${TOKEN}"}}
    server = read_one(tmp_path, entry, TOKEN="s3cret")
    assert server.url == "https://h/s3cret"
    assert server.headers == {"Authorization": "Bearer s3cret"}


def test_a_value_is_not_expanded_again(tmp_path: Path) -> None:
    """What a variable holds is text, whatever it looks like."""
    assert read_one(tmp_path, {"command": "${A}"}, A="${B}", B="b").command == "${B}"


def test_nothing_shows_a_secret(tmp_path: Path) -> None:
    """Neither repr nor rich's, nor errors of what came of it, nor a server's own words."""
    key = "line one/1\nline two/2"
    server = read_one(tmp_path, {"command": "c", "env": {"K": "${KEY}", "L": "literal"}}, KEY=key)
    for text in (repr(server), str(server), pretty_repr(server), f"{[server]}"):
        assert "line" not in text
        assert "literal" not in text
    said = (
        f"key {key}, first line one/1, second line two/2, in a URL line%20one%2F1%0Aline%20two%2F2."
    )
    assert server.conceal(said) == "key ***, first ***, second ***, in a URL ***."
    entry = {"url": "${KEY}", "headers": {"A": "b"}}
    refused = refusal(tmp_path, {"mcpServers": {"s": entry}}, KEY="hunter2:hunter2")
    assert "hunter2" not in refused


def test_short_values_are_no_secrets(tmp_path: Path) -> None:
    """Else a variable that holds `1` would make every text unreadable."""
    server = read_one(tmp_path, {"command": "c", "args": ["${N}"]}, N="1")
    assert server.conceal("1 of 12") == "1 of 12"
