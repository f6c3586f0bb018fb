"""§2 at the wire: JSON merge patches of a context."""

from typing import Any

import pytest
from bodies import CONTEXT_FIELDS, EVERYTHING
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import ENDLESS, Api, Json, invalid, ok, problem


def test_a_patch_changes_what_it_names_and_nothing_else(api: Api) -> None:
    """JSON merge patch: one revision more, of the record too; Location-free 200 with the Context."""
    before = ok(api.http.post("/contexts", json=EVERYTHING), 201)
    after = ok(api.http.patch(f"/contexts/{before['id']}", json={"title": "new", "mode": "act"}))
    assert after["revision"] == after["record_revision"] == before["revision"] + 1
    changed = {name for name in CONTEXT_FIELDS if before[name] != after[name]}
    allowed = {"title", "mode", "revision", "record_revision", "stream_cursor", "updated_at"}
    assert {"title", "mode"} <= changed <= allowed
    assert api.context(before["id"]) == after


def test_null_puts_a_member_back_to_its_default(api: Api) -> None:
    """RFC 7396: null removes; what is removed is as if never set."""
    before = ok(api.http.post("/contexts", json=EVERYTHING), 201)
    plain = ok(api.http.post("/contexts", json={}), 201)
    patch = dict.fromkeys(EVERYTHING)
    after = ok(api.http.patch(f"/contexts/{before['id']}", json=patch))
    for name in EVERYTHING:
        assert after[name] == plain[name], name


def test_a_patch_that_changes_nothing_takes_no_revision(api: Api) -> None:
    """A revision is a committed change: the same values again are none (§1)."""
    before = ok(api.http.post("/contexts", json=EVERYTHING), 201)
    for patch in ({}, {"title": EVERYTHING["title"]}, {"metadata": {"a": {}}}):
        after = ok(api.http.patch(f"/contexts/{before['id']}", json=patch))
        assert after["revision"] == before["revision"]
        assert after["updated_at"] == before["updated_at"]


def test_the_media_type_of_merge_patch_is_taken(api: Api, context_id: str) -> None:
    """RFC 7396 names `application/merge-patch+json`."""
    headers = {"content-type": "application/merge-patch+json"}
    response = api.http.patch(f"/contexts/{context_id}", content=b'{"title":"m"}', headers=headers)
    assert ok(response)["title"] == "m"


def test_a_patch_of_another_media_type_is_refused(api: Api, context_id: str) -> None:
    """415, and nothing changed."""
    headers = {"content-type": "text/plain"}
    response = api.http.patch(f"/contexts/{context_id}", content=b'{"title":"m"}', headers=headers)
    problem(response, 415, "unsupported_media_type")
    assert api.context(context_id)["title"] is None


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396, written from its text."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)
JSON_OBJECTS = st.dictionaries(st.sampled_from("abc"), JSON_VALUES, max_size=3)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=JSON_OBJECTS, patch=JSON_OBJECTS)
def test_metadata_is_merged_as_the_rfc_says(api: Api, before: Json, patch: Json) -> None:
    """Whatever the document and the patch: the RFC's own algorithm gives the same."""
    id_ = api.create(metadata=before)
    after = ok(api.http.patch(f"/contexts/{id_}", json={"metadata": patch}))
    assert after["metadata"] == merged(before, patch)


def test_the_approval_policy_is_merged_member_by_member(api: Api) -> None:
    """An object in a merge patch merges; null in it is the member's default."""
    id_ = api.create(approval_policy={"mode": "manual", "allow": ["a"], "max_calls": 3})
    patch = {"approval_policy": {"allow": None, "max_depth": 9}}
    after = ok(api.http.patch(f"/contexts/{id_}", json=patch))
    assert after["approval_policy"] == {
        "mode": "manual", "allow": [], "max_depth": 9, "max_calls": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"state": "idle"}, "state"),
        ({"id": "x"}, "id"),
        ({"title": 5}, "title"),
        ({"mode": "fly"}, "mode"),
        ({"on_busy": 1}, "on_busy"),
        ({"metadata": 1}, "metadata"),
        ({"provider": "no-such-provider"}, "provider"),
        ({"active_branch": 5}, "active_branch"),
        ({"active_branch": None}, "active_branch"),
        ({"tools": {}}, "tools"),
        ({"approval_policy": []}, "approval_policy"),
        ({"approval_policy": {"mode": "x"}}, "approval_policy.mode"),
        ({"approval_policy": {"nope": 1}}, "approval_policy.nope"),
    ],
)
def test_a_wrong_member_of_a_patch_is_named(
    api: Api, context_id: str, patch: Json, field: str
) -> None:
    """400, and nothing changed."""
    before = api.context(context_id)
    invalid(api.http.patch(f"/contexts/{context_id}", json={"title": "t", **patch}), field)
    assert api.context(context_id) == before


def test_a_patch_to_an_unknown_branch_is_404(api: Api, context_id: str) -> None:
    """branch_not_found, and nothing changed."""
    patch = {"active_branch": "elsewhere", "title": "t"}
    refusal = problem(
        api.http.patch(f"/contexts/{context_id}", json=patch), 404, "branch_not_found"
    )
    assert "elsewhere" in refusal.values()
    assert api.context(context_id)["title"] is None


def test_a_patch_works_while_a_turn_runs(api: Api, context_id: str) -> None:
    """The record is not the state: a title can change in every state."""
    api.send(context_id, ENDLESS)
    api.in_state(context_id, "streaming_llm_response")
    after = ok(api.http.patch(f"/contexts/{context_id}", json={"title": "t"}))
    assert after["title"] == "t"
    assert after["state"] == "streaming_llm_response"
    assert after["revision"] == after["record_revision"]
    api.cancel(context_id)
