"""The README's commands exist, and its conversation with a server goes as it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pages
import pytest
from serving import Server

from contextd.cli import cli

README = pages.text(pages.README)
URL = "http://127.0.0.1:8600"
COMMAND_S = 10
OPERATION = re.compile(r"\b(GET|HEAD|POST|PUT|PATCH|DELETE) (/[\w/{}.-]*)")

needs_curl = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="runs commands of curl in a shell"
)


def test_the_first_command_installs_and_shows_something() -> None:
    """It makes an environment, installs this folder, and runs a command that there is."""
    first = next(line for line in pages.indented(README) if "pip install" in line)
    venv, install, run = (shlex.split(part) for part in first.split(" && "))
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install == [".venv/bin/pip", "install", "-q", "."]
    assert run[0] == ".venv/bin/contextd"
    assert run[1] in cli.commands


def test_the_second_command_installs_and_runs_the_tests() -> None:
    """It is the first line that names pytest: `.ci/run` looks for that."""
    line = next(line for line in README.splitlines() if "bin/pytest" in line).strip()
    assert line in pages.indented(README)
    venv, install, run = (shlex.split(part) for part in line.split(" && "))
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[:4] == [".venv/bin/pip", "install", "-q", "-e"]
    found = re.fullmatch(r"\.\[(\w+)\]", install[4])
    assert found
    assert found.group(1) in pages.extras()
    assert run == [".venv/bin/pytest"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all that is asked here."""
    with Server(tmp_path_factory.mktemp("docs") / "contextd.db") as running:
        yield running


@needs_curl
def test_the_conversation_goes_as_the_readme_says(server: Server, tmp_path: Path) -> None:
    """Each command is run in one shell, and answers what stands below it; `…` is anything."""
    steps = [step for block in pages.blocks(README, "console") for step in conversation(block)]
    assert len(steps) >= 5
    variables = tmp_path / "variables"
    variables.touch()
    for command, expected in steps:
        printed = run(command, server, variables)
        assert re.fullmatch(pattern(expected), printed.rstrip("\n"), re.DOTALL), (command, printed)
        wait_until_idle(server)


def conversation(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with what it prints."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed.rstrip("\n")


def pattern(expected: str) -> str:
    return ".*?".join(re.escape(piece) for piece in expected.split("…"))


def run(command: str, server: Server, variables: Path) -> str:
    """Standard output. What the command sets is there for the next."""
    command = command.replace(URL, server.url)
    command = command.replace(".venv/bin/contextd", f"{shlex.quote(sys.executable)} -m contextd")
    command = command.replace("| python3 ", f"| {shlex.quote(sys.executable)} ")
    script = f"source {variables}; {command}; declare -p MESSAGE > {variables} 2> /dev/null || true"
    environ = {**os.environ, "CONTEXTD_URL": server.url, "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", script],
        check=False,
        env=environ,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    return done.stdout


def wait_until_idle(server: Server) -> None:
    """A person types more slowly than a turn runs. Waits for the signal that says it is over."""
    url = f"{server.url}/contexts/tea/stream"
    with httpx.stream("GET", url, timeout=COMMAND_S, trust_env=False) as stream:
        for line in stream.iter_lines():
            if '"new_state":"idle"' in line:
                return
    raise AssertionError("the stream ended before the turn")


def test_the_protocol_names_each_operation_and_no_other(server: Server) -> None:
    """What the pages call `METHOD /path` is in the OpenAPI document, and the other way around."""
    document = httpx.get(f"{server.url}/schema/openapi.json", trust_env=False).json()
    served = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    named = {
        (method, path) for method, path in OPERATION.findall(pages.everything()) if "…" not in path
    }
    assert named <= served
    assert served - set(OPERATION.findall(pages.doc("protocol.md"))) == set()


def test_each_metric_is_in_the_table_with_its_type(server: Server) -> None:
    """docs/running.md lists what `GET /metrics` has, and nothing else."""
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    served = set(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    listed = {
        (row[0].strip("`"), row[1])
        for row in pages.rows(pages.doc("running.md"))
        if row[0].startswith("`contextd_")
    }
    assert listed == served
