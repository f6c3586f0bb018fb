"""`contextd serve`: every setting is an option, but for secrets."""

import sys
from types import SimpleNamespace

import pytest

from contextd.cli import main
from contextd.cli.serve import DESCRIPTIONS, serve
from contextd.settings import NAMES, SECRETS, Settings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What the server would be started with, in place of starting it."""
    started: list[Settings] = []

    def run(settings: Settings) -> int:
        started.append(settings)
        return 3

    monkeypatch.setitem(sys.modules, "contextd.app", SimpleNamespace(run=run))
    for name in NAMES:
        monkeypatch.delenv(f"CONTEXTD_{name.upper()}", raising=False)
    return started


def test_every_setting_is_described_once() -> None:
    """One sentence each, and none for settings that are gone."""
    assert set(DESCRIPTIONS) == set(NAMES)
    assert all(described.endswith(".") for described in DESCRIPTIONS.values())


def test_every_setting_is_an_option_but_secrets() -> None:
    """A key on a command line could be read by every user of the machine."""
    options = {parameter.name for parameter in serve.params}
    assert options == set(NAMES) - SECRETS


def test_options_become_settings_and_the_exit_code_is_the_servers(served: list[Settings]) -> None:
    """Numbers, words, flags and lists; what is not given keeps its default."""
    more = ["--scripted-rate", "2.5", "--log-format", "json"]
    code = main(
        ["serve", "--port", "0", "--allow-remote", "--cors-origins", "http://a, http://b", *more]
    )
    assert code == 3
    assert served == [
        Settings(
            port=0,
            allow_remote=True,
            cors_origins=("http://a", "http://b"),
            scripted_rate=2.5,
            log_format="json",
        )
    ]


def test_options_come_before_the_environment(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--no-…` can take back what the environment says; secrets come from there alone."""
    monkeypatch.setenv("CONTEXTD_ALLOW_REMOTE", "true")
    monkeypatch.setenv("CONTEXTD_PORT", "9")
    monkeypatch.setenv("CONTEXTD_OPENAI_API_KEY", "k")
    main(["serve", "--no-allow-remote"])
    assert (served[0].allow_remote, served[0].port) == (False, 9)
    assert served[0].openai_api_key == "k"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "x"], "--port"),
        (["--port", "65536"], "--port"),
        (["--provider", "nobody"], "--provider"),
        (["--openai-api-key", "k"], "--openai-api-key"),
        (["surplus"], "surplus"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(
    served: list[Settings],
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It names what is wrong, and nothing is started."""
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("contextd: ")
    assert named in err
    assert served == []
