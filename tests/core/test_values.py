"""Settings, times and signals hold what the contract says of them."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd.core.signal import ContentDelta, Heartbeat, MessageCompleted, StateChanged
from contextd.core.values import timestamp
from contextd.settings import NAMES, Settings, SettingsError, environment_name, load

LONGEST_ID = "x" * 64
NOW = "2026-11-21T04:13:00.123Z"


@given(st.integers(min_value=0, max_value=4_102_444_800_000))
def test_times_are_rfc_3339_with_milliseconds_and_z(epoch_ms: int) -> None:
    """§1: UTC, milliseconds, Z; and nothing is rounded away."""
    text = timestamp(epoch_ms)
    assert len(text) == len(NOW)
    assert text.endswith("Z")
    read = datetime.fromisoformat(text)
    assert round((read - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000) == epoch_ms


def test_the_largest_signal_is_under_a_kilobyte_and_no_signal_has_a_field_for_text() -> None:
    """§4: four types, each under 1 KB."""
    number = 2**53 - 1
    word = "k" * 64
    signals = [
        StateChanged(
            context_id=LONGEST_ID,
            new_state=word,
            revision=number,
            record_revision=number,
            timestamp=NOW,
        ),
        ContentDelta(
            context_id=LONGEST_ID,
            message_id=LONGEST_ID,
            current_sequence=number,
            role="assistant",
            kind=word,
            timestamp=NOW,
        ),
        MessageCompleted(
            context_id=LONGEST_ID,
            message_id=LONGEST_ID,
            final_sequence=number,
            role="assistant",
            kind=word,
            status="interrupted",
            revision=number,
            timestamp=NOW,
        ),
        Heartbeat(timestamp=NOW),
    ]
    fields = set()
    for signal in signals:
        assert len(msgspec.json.encode(signal)) < 1000
        fields |= set(msgspec.json.decode(msgspec.json.encode(signal)))
    assert fields == {
        "type", "context_id", "message_id", "new_state", "revision", "record_revision",
        "timestamp", "current_sequence", "final_sequence", "role", "kind", "status",
    }  # fmt: skip


def test_settings_come_from_the_environment_and_overrides_win() -> None:
    """§12: every option is also CONTEXTD_…; an empty variable counts as unset."""
    environ = {
        "CONTEXTD_PORT": "9",
        "CONTEXTD_HOST": "",
        "CONTEXTD_CORS_ORIGINS": "http://a, http://b",
    }
    settings = load(environ, {"throttle_ms": "30", "model": None})
    assert settings.port == 9
    assert settings.host == Settings().host
    assert settings.cors_origins == ("http://a", "http://b")
    assert settings.throttle_ms == 30
    assert environment_name(NAMES[0]) == "CONTEXTD_HOST"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONTEXTD_PORT", "x"), ("CONTEXTD_PORT", "70000"), ("CONTEXTD_PROVIDER", "y"),
     ("CONTEXTD_LEASE_S", "0"), ("CONTEXTD_ALLOW_REMOTE", "perhaps")],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_by_name(name: str, value: str) -> None:
    """A typo must not start a server with something else."""
    with pytest.raises(SettingsError, match=name):
        load({name: value})


def test_a_secret_is_in_no_repr_and_no_error() -> None:
    """Keys stay out of logs."""
    settings = load({"CONTEXTD_OPENAI_API_KEY": "sk-very-secret"})
    assert "sk-very-secret" not in repr(settings)
    assert settings.openai_api_key == "sk-very-secret"
