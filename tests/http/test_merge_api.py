"""§9 at the wire: what a merge brings from one branch to another, and what it says of the rest."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from branching import Tree, ids, reasons
from producing import WORKER, Pen
from wire import ENDLESS, Api, Json, invalid, ok, problem, script

COPIED = (
    "role", "kind", "status", "current_sequence", "final_sequence", "media_type", "finish_reason",
    "error", "client_metadata",
)  # fmt: skip
TURN = script({"thinking": "hm m "}, {"text": "so it is"}, {"usage": {"completion_tokens": 3}})


@pytest.fixture
def tree(api: Api, context_id: str) -> Tree:
    """A context with one message, after which `x` was forked off."""
    tree = Tree(api, context_id)
    tree.store("root")
    tree.make("x")
    return tree


# What goes over


def test_the_messages_since_the_common_ancestor_are_appended(tree: Tree) -> None:
    """In their order after what is there: one chain, one change, and the source stays as it was."""
    tree.api.run(tree.context_id, TURN, branch="x")
    main = tree.messages("main")
    last = tree.store("meanwhile")
    source, before = tree.messages("x"), tree.context()
    answer = tree.merge("main", "x")
    assert answer["left_out"] == []
    listed, after = tree.messages("main"), tree.context()
    assert ids(listed) == [*ids(main), last, *answer["added"]]
    for above, below in pairwise(listed):
        assert below["parent_id"] == above["id"]
    assert tree.line("main") == ["root", "meanwhile", TURN, "hm m ", "so it is"]
    assert tree.messages("x") == source
    assert after["revision"] == before["revision"] + 1
    assert after["record_revision"] == before["record_revision"]
    assert after["message_count"] == before["message_count"] + 3
    assert tree.get("main")["leaf_message_id"] == answer["added"][-1]


def test_a_copy_says_what_it_is_of(tree: Tree) -> None:
    """A new id and its origin; what the message is, is as it was; of a turn it has nothing."""
    display = {"payload": {"type": "text", "content": "a b", "display": "shown"}}
    body = {**display, "client_metadata": {"k": [1]}, "branch": "x", "respond": False}
    ok(tree.api.http.post(f"/contexts/{tree.context_id}/messages", json=body), 201)
    tree.api.run(tree.context_id, TURN, branch="x")
    _, *source = tree.messages("x")
    answer = tree.merge("main", "x")
    _, *copies = tree.messages("main")
    assert ids(copies) == answer["added"]
    assert set(ids(copies)).isdisjoint(ids(source))
    for of, copy in zip(source, copies, strict=True):
        assert {name: copy[name] for name in COPIED} == {name: of[name] for name in COPIED}
        origin = {"merged_from": {"message_id": of["id"], "branch": "x"}}
        assert copy["metadata"] == {**of["metadata"], **origin}
        assert (copy["turn_id"], copy["usage"]) == (None, None)
        for name in ("chunks", "characters", "bytes"):
            assert copy["stats"][name] == of["stats"][name]
        assert copy["completed_at"] == copy["created_at"] >= of["created_at"]
        texts = [tree.api.texts(tree.context_id, message["id"]) for message in (of, copy)]
        assert texts[0] == texts[1]
        pulled = tree.api.pull(tree.context_id, copy["id"])
        assert pulled["final"] is True
        assert pulled["content"] == "".join(texts[0])


def test_once_more_adds_nothing(tree: Tree) -> None:
    """What is there already is left out, and no revision is made; what is new goes over."""
    tree.store("two", branch="x")
    tree.merge("main", "x")
    before = tree.context()
    answer = tree.merge("main", "x")
    assert answer["added"] == []
    assert reasons(answer) == {tree.ids("x")[1]: "already_there"}
    assert tree.context() == before
    tree.store("three", branch="x")
    assert len(tree.merge("main", "x")["added"]) == 1
    assert tree.line("main") == ["root", "two", "three"]


def test_branches_can_be_merged_into_each_other(tree: Tree) -> None:
    """A copy does not come back to where it is from, and a third branch gets each only once."""
    tree.store("on x", branch="x")
    tree.store("on main")
    tree.make("third", from_message_id=tree.ids("main")[0])
    tree.merge("main", "x")
    answer = tree.merge("x", "main")
    assert set(reasons(answer).values()) == {"already_there"}
    assert tree.line("main") == ["root", "on main", "on x"]
    assert tree.line("x") == ["root", "on x", "on main"]
    tree.merge("third", "x")
    before = tree.messages("third")
    assert tree.merge("third", "main")["added"] == []
    assert tree.messages("third") == before
    assert tree.line("third") == ["root", "on x", "on main"]
    origins = [message["metadata"]["merged_from"]["message_id"] for message in before[1:]]
    assert origins == [tree.ids("x")[1], tree.ids("main")[1]]


def test_branches_without_a_common_message_can_be_merged(tree: Tree) -> None:
    """Then all of the source goes over, also into an empty branch."""
    tree.make("empty", from_message_id=None)
    answer = tree.merge("empty", "main")
    (copy,) = tree.messages("empty")
    assert (copy["id"], copy["parent_id"]) == (answer["added"][0], None)
    assert tree.line("empty") == ["root"]
    assert tree.merge("main", "empty")["added"] == []


def test_a_branch_gains_nothing_from_itself(tree: Tree) -> None:
    """All of it is there already."""
    before = tree.context()
    assert tree.merge("main", "main") == {"added": [], "left_out": []}
    (root,) = tree.ids("main")
    answer = tree.merge("main", "main", message_ids=[root])
    assert (answer["added"], reasons(answer)) == ([], {root: "already_there"})
    assert tree.context() == before


def test_named_messages_go_over_in_the_order_of_the_conversation(tree: Tree) -> None:
    """Each once, whatever the order in which they are named, and no other."""
    message_ids = [tree.store(text, branch="x") for text in ("a", "b", "c", "d")]
    named = [message_ids[3], message_ids[1], message_ids[3]]
    answer = tree.merge("main", "x", message_ids=named)
    assert (len(answer["added"]), answer["left_out"]) == (2, [])
    assert tree.line("main") == ["root", "b", "d"]
    tree.merge("main", "x")
    assert tree.line("main") == ["root", "b", "d", "a", "c"]
    assert tree.merge("main", "x", message_ids=[]) == {"added": [], "left_out": []}


def test_a_message_without_text_goes_over(tree: Tree) -> None:
    """A turn that was cancelled before it said anything is part of the conversation."""
    answer = tree.api.send(tree.context_id, script({"delay_ms": 600_000}), branch="x")
    tree.api.cancel(tree.context_id)
    tree.api.ended(tree.context_id, answer["turn_id"])
    tree.merge("main", "x")
    copy = tree.messages("main")[-1]
    assert (copy["status"], copy["final_sequence"], copy["role"]) == ("cancelled", 0, "assistant")
    assert tree.api.pull(tree.context_id, copy["id"])["final"] is True


def test_the_copy_of_a_produced_message_is_nobodys(tree: Tree) -> None:
    """It has no epoch; its id is no producer's, and nothing can be written to it."""
    pen = Pen(tree.api, tree.context_id)
    pen.open(branch="x", kind="report", metadata={"job": 7}, media_type="text/html")
    pen.write("Hé", "😀\n")
    ok(pen.post({"finish_reason": "stop"}, "complete"))
    (copy_id,) = tree.merge("main", "x")["added"]
    copy = tree.api.message(tree.context_id, copy_id)
    assert "epoch" not in copy
    assert (copy["kind"], copy["media_type"], copy["metadata"]["job"]) == ("report", "text/html", 7)
    assert tree.api.texts(tree.context_id, copy_id) == ["Hé", "😀\n"]
    other = pen.other(copy_id)
    assert problem(other.put(), 409, "id_taken")["id"] == copy_id
    problem(other.post({"content": "x"}), 409, "message_closed")


def test_metadata_of_a_producers_own_does_no_harm(tree: Tree) -> None:
    """Whatever stands where a merge writes its origin."""
    for n, told in enumerate((None, 5, "x", [], {}, {"message_id": 5}, {"message_id": None})):
        pen = Pen(tree.api, tree.context_id, f"p{n}")
        pen.open(branch="x", metadata={"merged_from": told})
        ok(pen.post({}, "complete"))
    answer = tree.merge("main", "x")
    assert len(answer["added"]) == 7
    for n, message in enumerate(tree.messages("main")[1:]):
        assert message["metadata"]["merged_from"] == {"message_id": f"p{n}", "branch": "x"}


def test_what_is_said_next_hangs_on_the_last_copy(tree: Tree) -> None:
    """The branch goes on from there, and copies outlive the branch that they came from."""
    tree.api.run(tree.context_id, "two", branch="x")
    added = tree.merge("main", "x")["added"]
    tree.delete("x")
    answer, _ = tree.api.run(tree.context_id, "three")
    assert tree.api.message(tree.context_id, answer["message_id"])["parent_id"] == added[-1]
    assert tree.line("main") == ["root", "two", "You said: two", "three", "You said: three"]


# What stays


def test_named_messages_that_are_not_the_sources_are_left_out(tree: Tree) -> None:
    """Of the target, of another branch, of nobody: not_on_source; above the fork: already_there."""
    own, other = tree.store("own"), "other"
    tree.make("y", from_message_id=tree.ids("main")[0])
    other = tree.store("other", branch="y")
    good = tree.store("good", branch="x")
    named = [own, other, "unknown", tree.ids("main")[0], good]
    answer = tree.merge("main", "x", message_ids=named)
    assert len(answer["added"]) == 1
    assert reasons(answer) == {
        own: "not_on_source",
        other: "not_on_source",
        "unknown": "not_on_source",
        tree.ids("main")[0]: "already_there",
    }
    assert tree.line("main") == ["root", "own", "good"]


@pytest.mark.parametrize("named", [False, True])
def test_what_is_open_or_queued_is_left_out(tree: Tree, named: bool) -> None:
    """And goes over when it is there."""
    sent = tree.api.send(tree.context_id, ENDLESS, branch="x")
    opened = tree.api.opened(tree.context_id)["message_id"]
    queued = tree.api.send(tree.context_id, "later", branch="x")
    more: Json = {}
    if named:
        more["message_ids"] = [queued["message_id"], opened, sent["message_id"]]
    answer = tree.merge("main", "x", **more)
    assert len(answer["added"]) == 1
    assert reasons(answer) == {opened: "open", queued["message_id"]: "queued"}
    assert tree.line("main") == ["root", ENDLESS]
    tree.api.cancel(tree.context_id)
    tree.api.ended(tree.context_id, queued["turn_id"])
    assert len(tree.merge("main", "x")["added"]) == 3
    assert tree.line("main")[-2:] == ["later", "You said: later"]


def test_the_answer_of_a_turn_that_was_retried_is_left_out(tree: Tree) -> None:
    """As it is from what the model is sent (§6); its message goes over, and the new answer."""
    text = script({"text": "half "}, {"error": "fatal"})
    _, turn = tree.api.run(tree.context_id, text, branch="x")
    (failed,) = tree.api.replies(tree.context_id, turn["id"])
    assert reasons(tree.merge("main", "x", message_ids=[failed["id"]])) == {}
    tree.make("late", from_message_id=tree.ids("main")[0])
    again = ok(tree.api.http.post(f"/contexts/{tree.context_id}/retry"), 202)
    tree.api.ended(tree.context_id, again["turn_id"])
    answer = tree.merge("late", "x")
    assert reasons(answer) == {failed["id"]: "retried"}
    assert tree.line("late") == ["root", text, "half "]


def test_calls_of_tools_and_their_results_are_left_out(tree: Tree) -> None:
    """They ran once; what the model said before and after goes over."""
    call = {"tool_call": {"name": "no_such_tool", "arguments": {}}}
    text = script({"text": "before "}, call, {"text": "after"})
    _, turn = tree.api.run(tree.context_id, text, branch="x")
    assert turn["status"] == "completed"
    kinds = {m["id"]: m["kind"] for m in tree.messages("x")}
    answer = tree.merge("main", "x")
    assert tree.line("main") == ["root", text, "before ", "after"]
    of_tools = [id_ for id_, kind in kinds.items() if kind in ("tool_call", "tool_result")]
    assert len(of_tools) == 2
    assert reasons(answer) == dict.fromkeys(of_tools, "tool_call")


# What is refused


def test_a_branch_on_which_a_turn_runs_takes_no_merge(tree: Tree) -> None:
    """409 context_busy; others do, also from that branch, and it does when the turn is over."""
    tree.store("two", branch="x")
    tree.make("y")
    tree.api.send(tree.context_id, ENDLESS)
    tree.api.opened(tree.context_id)
    before = tree.context()
    refusal = problem(tree.ask_merge("main", {"source": "x"}), 409, "context_busy")
    assert refusal["state"] == "streaming_llm_response"
    assert tree.context() == before
    tree.merge("y", "x")
    tree.merge("y", "main")
    assert tree.line("y") == ["root", "two", ENDLESS]
    tree.api.cancel(tree.context_id)
    tree.merge("main", "x")
    assert tree.line("main")[-1] == "two"


def test_a_branch_with_an_open_produced_message_takes_a_merge(tree: Tree) -> None:
    """After that message, whose producer goes on."""
    tree.store("two", branch="x")
    pen = Pen(tree.api, tree.context_id)
    pen.open(branch="main")
    tree.merge("main", "x")
    pen.write("text")
    ok(pen.post({}, "complete"))
    assert tree.line("main") == ["root", "text", "two"]
    assert tree.context()["state"] == "idle"


def test_a_waiting_turn_runs_after_what_was_merged(tree: Tree) -> None:
    """A queued message gets its place when its turn starts."""
    tree.store("two", branch="x")
    tree.make("y", from_message_id=tree.ids("main")[0])
    tree.api.send(tree.context_id, ENDLESS, branch="y")
    queued = tree.api.send(tree.context_id, "later")
    tree.merge("main", "x")
    tree.api.cancel(tree.context_id)
    tree.api.ended(tree.context_id, queued["turn_id"])
    assert tree.line("main") == ["root", "two", "later", "You said: later"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "source"),
        ({"source": None}, "source"),
        ({"source": "a b"}, "source"),
        ({"source": "x", "message_ids": "y"}, "message_ids"),
        ({"source": "x", "message_ids": [5]}, "message_ids[0]"),
        ({"source": "x", "message_ids": ["a b"]}, "message_ids[0]"),
        ({"source": "x", "message_ids": ["a"] * 1001}, "message_ids"),
        ({"source": "x", "colour": "red"}, "colour"),
    ],
)
def test_a_wrong_merge_is_400(tree: Tree, body: Any, field: str) -> None:
    """It names the field and changes nothing."""
    before = tree.context()
    invalid(tree.ask_merge("main", body), field)
    assert tree.context() == before


def test_a_merge_of_what_is_not_there_is_404(tree: Tree) -> None:
    """The branch that is missing is named, whichever it is."""
    for name, source in (("no", "x"), ("main", "no")):
        refusal = problem(tree.ask_merge(name, {"source": source}), 404, "branch_not_found")
        assert refusal["branch"] == "no"


@pytest.mark.slow
def test_too_many_messages_are_413(api: Api) -> None:
    """More than 1,000 in one merge: nothing goes over, and named in parts all of it does."""
    tree = Tree(api, api.create())
    tree.make("empty")
    with ThreadPoolExecutor(8) as pool:  # many at a time go into one commit
        list(pool.map(tree.store, map(str, range(1001))))
    message_ids, said = tree.ids("main"), tree.line("main")
    assert sorted(said) == sorted(map(str, range(1001)))
    before = tree.context()
    refusal = problem(tree.ask_merge("empty", {"source": "main"}), 413, "payload_too_large")
    assert refusal["limit_messages"] == 1000
    assert tree.context() == before
    assert len(tree.merge("empty", "main", message_ids=message_ids[:1000])["added"]) == 1000
    answer = tree.merge("empty", "main")
    assert (len(answer["added"]), len(answer["left_out"])) == (1, 1000)
    assert tree.line("empty") == said


def test_too_much_text_is_413(tree: Tree) -> None:
    """More than 16 MiB, or than 100,000 chunks, in one merge; what is less goes over."""
    text = "x" * 65_536
    for name, chunks, batches in (("big", [text] * 100, 3), ("long", ["y"] * 1000, 101)):
        pen = Pen(tree.api, tree.context_id, name)
        pen.open(branch="x")
        for _ in range(batches):
            pen.write(*chunks)
        ok(pen.post({}, "complete"))
    small = tree.store("small", branch="x")
    for named, fact, limit in (
        (["big"], "limit_bytes", 16 * 1024 * 1024),
        (["long"], "limit_chunks", 100_000),
    ):
        body = {"source": "x", "message_ids": named}
        refusal = problem(tree.ask_merge("main", body), 413, "payload_too_large")
        assert refusal[fact] == limit
    assert len(tree.merge("main", "x", message_ids=[small])["added"]) == 1


# Readers


def test_readers_are_told_of_each_copy(tree: Tree) -> None:
    """A delta, the completion, and then the state, of one revision; its text is there by then."""
    tree.api.run(tree.context_id, TURN, branch="x")
    start = tree.context()
    with tree.api.stream(tree.context_id, throttle_ms=0) as stream:
        stream.current()
        added = tree.merge("main", "x")["added"]
        frames = stream.until_state("idle", after=start["revision"])
    closed = [frame for frame in frames if frame.type == "message_completed"]
    assert [frame["message_id"] for frame in closed] == added
    for frame in closed:
        assert frame["revision"] == start["revision"] + 1
        deltas = [f for f in frames if f.type == "content_delta"]
        assert frame["message_id"] in [delta["message_id"] for delta in deltas]
        pulled = tree.api.pull(tree.context_id, frame["message_id"])
        assert (pulled["sequence"], pulled["final"]) == (frame["final_sequence"], True)
    assert frames[-1].get("new_state") == "idle"
    replayed = tree.api.attach(tree.context_id, last_event_id=start["stream_cursor"])
    told = [f["message_id"] for f in replayed if f.type == "message_completed"]
    assert told == added
    changed = tree.api.messages(tree.context_id, since_revision=start["revision"])
    assert ids(changed) == added


def test_an_id_of_a_copy_cannot_be_sent_again(tree: Tree) -> None:
    """It is a message of its own: another send with its id is 409 id_taken."""
    tree.store("two", branch="x")
    (copy,) = tree.merge("main", "x")["added"]
    response = tree.api.post_message(tree.context_id, "two", message_id=copy)
    assert problem(response, 409, "id_taken")["id"] == copy
    assert WORKER["id"] not in str(tree.api.message(tree.context_id, copy))
