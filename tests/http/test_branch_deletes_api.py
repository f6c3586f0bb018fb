"""§9 at the wire: a branch is deleted, and what that leaves."""

import pytest
from branching import Tree, ids
from producing import Pen
from wire import ENDLESS, Api, ok, problem, script


@pytest.fixture
def tree(api: Api, context_id: str) -> Tree:
    """The branches of a new context."""
    return Tree(api, context_id)


def test_a_deleted_branch_is_gone_and_its_messages_are_not(tree: Tree) -> None:
    """They leave every list, can be read by their ids, and be gone on from."""
    tree.store("one")
    tree.make("x")
    _, turn = tree.api.run(tree.context_id, "two", branch="x")
    message_ids = turn["message_ids"]
    before = tree.context()
    tree.delete("x")
    after = tree.context()
    assert after["revision"] == after["record_revision"] == before["revision"] + 1
    assert after["message_count"] == before["message_count"]
    problem(tree.find("x"), 404, "branch_not_found")
    problem(tree.remove("x"), 404, "branch_not_found")
    response = tree.api.http.get(f"/contexts/{tree.context_id}/messages?branch=x")
    problem(response, 404, "branch_not_found")
    problem(tree.api.post_message(tree.context_id, "x", branch="x"), 404, "branch_not_found")
    assert (tree.names(), tree.line("main")) == (["main"], ["one"])
    assert tree.api.text(tree.context_id, message_ids[-1]) == "You said: two"
    assert tree.api.turn(tree.context_id, turn["id"]) == turn
    changed = tree.api.messages(tree.context_id, since_revision=0)
    assert set(message_ids) < set(ids(changed))
    assert tree.api.messages(tree.context_id, since_revision=before["revision"]) == []
    tree.make("y", from_message_id=message_ids[-1])
    assert tree.line("y") == ["one", "two", "You said: two"]


def test_the_active_branch_cannot_be_deleted(tree: Tree) -> None:
    """409 branch_active with its name; main can be once it is not active."""
    tree.store("one")
    tree.make("x")
    before = tree.context()
    assert problem(tree.remove("main"), 409, "branch_active")["branch"] == "main"
    assert tree.context() == before
    tree.switch("x")
    tree.delete("main")
    assert tree.names() == ["x"]
    assert tree.line("x") == ["one"]
    assert problem(tree.remove("x"), 409, "branch_active")["branch"] == "x"


def test_a_branch_where_a_turn_runs_or_waits_is_not_deleted(tree: Tree) -> None:
    """409 context_busy while it does; when it is over the branch can go."""
    first = tree.store("one")
    for name in ("running", "waiting", "free"):
        tree.make(name, from_message_id=first)
    tree.api.send(tree.context_id, ENDLESS, branch="running")
    tree.api.opened(tree.context_id)
    queued = tree.api.send(tree.context_id, "later", branch="waiting")
    before = tree.context()
    for name in ("running", "waiting"):
        refusal = problem(tree.remove(name), 409, "context_busy")
        assert (refusal["state"], refusal["branch"]) == ("streaming_llm_response", name)
    assert tree.context() == before
    tree.delete("free")
    path = f"/contexts/{tree.context_id}/turns/{queued['turn_id']}/cancel"
    ok(tree.api.http.post(path))
    tree.delete("waiting")
    tree.api.cancel(tree.context_id)
    tree.delete("running")
    assert tree.names() == ["main"]


def test_a_branch_with_an_open_produced_message_is_not_deleted(tree: Tree) -> None:
    """409 context_busy; a branch that only shares the message can go."""
    tree.store("one")
    tree.make("x")
    pen = Pen(tree.api, tree.context_id)
    pen.open(branch="x")
    tree.make("shares", from_message_id=pen.message_id)
    assert problem(tree.remove("x"), 409, "context_busy")["state"] == "producing"
    tree.delete("shares")
    pen.write("text")
    ok(pen.post({}, "complete"))
    tree.delete("x")
    assert tree.api.text(tree.context_id, pen.message_id) == "text"


def test_what_was_forked_from_a_deleted_branch_stays(tree: Tree) -> None:
    """With all that stands above it."""
    tree.store("one")
    tree.make("x")
    tree.store("two", branch="x")
    last = tree.store("three", branch="x")
    tree.make("y", from_message_id=last)
    tree.store("four", branch="y")
    tree.delete("x")
    assert tree.line("y") == ["one", "two", "three", "four"]
    assert tree.get("y")["from_message_id"] == last


def test_a_deleted_name_can_be_given_again(tree: Tree) -> None:
    """It is another branch then, and has nothing of the old one."""
    first = tree.store("one")
    old = tree.make("x")
    tree.store("old", branch="x")
    tree.delete("x")
    tree.store("two")
    new = tree.make("x", from_message_id=first)
    assert new["leaf_message_id"] == first
    assert new["created_at"] >= old["created_at"]
    tree.store("new", branch="x")
    assert tree.line("x") == ["one", "new"]
    assert tree.names() == ["main", "x"]


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_turn_of_a_deleted_branch_is_not_retried(tree: Tree, again: bool) -> None:
    """branch_not_found, also where another branch has the name now; the context goes on."""
    tree.store("one")
    tree.make("x")
    _, turn = tree.api.run(tree.context_id, script({"error": "fatal"}), branch="x")
    assert turn["status"] == "failed"
    tree.delete("x")
    if again:
        tree.make("x")
    before = tree.context()
    response = tree.api.http.post(f"/contexts/{tree.context_id}/retry")
    assert problem(response, 404, "branch_not_found")["branch"] == "x"
    assert tree.context() == before
    assert tree.api.run(tree.context_id, "two")[1]["status"] == "completed"
