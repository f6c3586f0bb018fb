"""The running server is as its OpenAPI document says, and nothing that fits it breaks the server."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from serving import Server

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = 10
METHODS = {"get", "put", "post", "patch", "delete"}
HOOKS = {"SCHEMATHESIS_HOOKS": "as_a_client", "PYTHONPATH": str(CONFIG.parent)}
LIMIT_S = 400  # a bound for a busy machine; alone it takes a tenth of that
# What is opened by chance is soon closed: else a pull that waits for it would wait its time.
SETTINGS = {"scripted_rate": 0, "producer_silence_s": 0.2}


@pytest.mark.timeout(450)
@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("coverage", marks=pytest.mark.long)])
def test_schemathesis_finds_nothing(
    tmp_path: Path, environment: dict[str, str], phases: str
) -> None:
    """Every operation, valid and invalid requests, all checks."""
    with Server(tmp_path / "contextd.db", settings=SETTINGS) as server:
        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG),
                "run", f"{server.url}/schema/openapi.json",
                "--max-examples", str(EXAMPLES), "--seed", "1", "--phases", phases,
            ],
            cwd=tmp_path,
            env=environment | HOOKS,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"Tested: {_operations(server.url)}" in run.stdout, run.stdout
        assert "Traceback" not in server.log, server.log


def _operations(url: str) -> int:
    paths = httpx.get(f"{url}/schema/openapi.json").json()["paths"]
    return sum(method in METHODS for path in paths.values() for method in path)
