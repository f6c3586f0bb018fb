"""Tokens are counted where a vocabulary is installed, and honestly estimated elsewhere."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextd import tokens
from contextd.tokens import COUNTED_CHARS_MAX, TokenCount, count_tokens, estimate_tokens

# Texts with their counts by the two vocabularies, as two independent implementations gave them.
SAMPLES = json.loads((Path(__file__).parent / "samples.json").read_text(encoding="utf-8"))


@pytest.fixture
def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the vocabularies were not installed."""
    monkeypatch.setattr(tokens, "_vocabulary", lambda name: None)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_estimate_is_within_a_sixth_of_the_truth(name: str) -> None:
    """For prose in many scripts, code, JSON, keys and emoji."""
    sample = SAMPLES[name]
    assert estimate_tokens(sample["text"]) == pytest.approx(sample["o200k_base"], rel=1 / 6)


def test_the_errors_of_a_mixed_text_cancel_out() -> None:
    """All samples together are estimated to within a few percent."""
    mixed = "\n".join(sample["text"] for sample in SAMPLES.values())
    counted = sum(sample["o200k_base"] for sample in SAMPLES.values())
    assert estimate_tokens(mixed) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("openai/gpt-4.1-nano", "o200k_base"),
        ("gpt-oss-120b", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-turbo", "cl100k_base"),
        ("ft:gpt-3.5-turbo", "cl100k_base"),
    ],
)
def test_a_known_models_count_is_exact(name: str, model: str, vocabulary: str) -> None:
    """With the extra, and without a network."""
    pytest.importorskip("splintr")
    sample = SAMPLES[name]
    assert count_tokens(sample["text"], model) == TokenCount(sample[vocabulary], exact=True)


@pytest.mark.parametrize(
    "model", [None, "", "gpt-4.9", "gpt-40", "o365", "mistral-large", "my-gpt-4"]
)
def test_another_models_count_is_never_called_exact(model: str | None) -> None:
    """It is the newest vocabulary's, or the rule's."""
    assert not count_tokens("Seventeen gulls.", model).exact


@pytest.mark.usefixtures("without_the_extra")
def test_without_the_extra_a_known_model_gets_the_estimate() -> None:
    """And it says so."""
    text = SAMPLES["english"]["text"]
    assert count_tokens(text, "gpt-4o") == TokenCount(estimate_tokens(text), exact=False)


def test_a_library_that_is_missing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is optional: its import may fail."""

    def absent(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tokens, "importlib", SimpleNamespace(import_module=absent))
    assert tokens._vocabulary.__wrapped__("o200k_base") is None


def test_a_very_long_text_is_estimated() -> None:
    """So that counting stays short whatever the text is."""
    text = "a" * (COUNTED_CHARS_MAX + 1)
    assert count_tokens(text, "gpt-4o") == TokenCount(estimate_tokens(text), exact=False)


def test_a_control_tokens_spelling_is_ordinary_text() -> None:
    """A user who types one does not change the count into that of the control token."""
    assert count_tokens("<|endoftext|>", "gpt-4o").tokens > 1


@given(st.text(alphabet=st.characters(), max_size=200))
def test_any_text_has_a_count(text: str) -> None:
    """Also half a surrogate pair; nothing but the empty text has no tokens."""
    for count in (count_tokens(text, "gpt-4o").tokens, estimate_tokens(text)):
        assert (count > 0) == (text != "")


@given(st.text(max_size=200), st.text(max_size=200))
def test_more_text_is_never_estimated_to_be_less(text: str, more: str) -> None:
    """A line that is added adds tokens, or at least takes none away."""
    assert estimate_tokens(text + "\n" + more) >= estimate_tokens(text)
