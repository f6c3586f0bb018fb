"""§9 at the wire: branches are made, listed and switched; forks through `parent_id`."""

from itertools import pairwise
from typing import Any

import pytest
from branching import BRANCH_FIELDS, Tree, ids
from wire import ENDLESS, TIMESTAMP, Api, Json, invalid, ok, problem, script

TWO_MESSAGES = script({"thinking": "hm "}, {"text": "so it is"})


@pytest.fixture
def tree(api: Api, context_id: str) -> Tree:
    """The branches of a new context."""
    return Tree(api, context_id)


def unchanged(tree: Tree, before: Json) -> bool:
    return tree.context() == before


# Making


def test_a_context_begins_with_main(tree: Tree) -> None:
    """It is active and starts at nothing; once something is said, its leaf is the last message."""
    (main,) = tree.all()
    assert set(main) == BRANCH_FIELDS
    assert (main["name"], main["active"]) == ("main", True)
    assert (main["from_message_id"], main["leaf_message_id"]) == (None, None)
    assert TIMESTAMP.fullmatch(main["created_at"])
    assert tree.get("main") == main
    leaf = tree.store("one")
    assert tree.get("main") == {**main, "leaf_message_id": leaf}


def test_a_branch_starts_where_the_active_one_ends(tree: Tree) -> None:
    """201 with Location; it shares all messages, is not active, and copies nothing."""
    tree.api.run(tree.context_id, "one")
    before, main = tree.context(), tree.messages("main")
    response = tree.post({"name": "other"})
    branch = ok(response, 201)
    assert set(branch) == BRANCH_FIELDS
    assert branch["active"] is False
    assert branch["from_message_id"] == branch["leaf_message_id"] == main[-1]["id"]
    assert response.headers["location"] == f"{tree.path}/other"
    assert ok(tree.api.http.get(response.headers["location"])) == branch
    assert tree.messages("other") == main
    after = tree.context()
    assert after["revision"] == after["record_revision"] == before["revision"] + 1
    assert (after["active_branch"], after["message_count"]) == ("main", 2)
    assert tree.all() == [tree.get("main"), branch]


def test_the_active_branch_is_the_default_also_when_it_is_not_main(tree: Tree) -> None:
    """From the leaf of what is active now."""
    tree.store("one")
    tree.make("a")
    leaf = tree.store("two", branch="a")
    tree.switch("a")
    assert tree.make("b")["from_message_id"] == leaf


def test_a_branch_starts_after_any_message(tree: Tree) -> None:
    """Also after one in the middle of a turn; what follows on each is its own."""
    answer, _ = tree.api.run(tree.context_id, TWO_MESSAGES)
    main = tree.messages("main")
    assert [message["kind"] for message in main] == ["text", "thinking", "text"]
    branch = tree.make("middle", from_message_id=main[1]["id"])
    assert branch["from_message_id"] == branch["leaf_message_id"] == main[1]["id"]
    assert tree.messages("middle") == main[:2]
    first = tree.store("else", branch="middle")
    assert tree.api.message(tree.context_id, first)["parent_id"] == main[1]["id"]
    assert tree.messages("main") == main
    assert tree.ids("middle") == [answer["message_id"], main[1]["id"], first]
    assert tree.get("middle") == {**branch, "leaf_message_id": first}


def test_a_branch_from_null_starts_empty(tree: Tree) -> None:
    """So that the very first message can be said anew."""
    tree.api.run(tree.context_id, "one")
    branch = tree.make("anew", from_message_id=None)
    assert (branch["from_message_id"], branch["leaf_message_id"]) == (None, None)
    assert tree.messages("anew") == []
    answer, turn = tree.api.run(tree.context_id, "uno", branch="anew")
    assert turn["branch"] == "anew"
    assert tree.line("anew") == ["uno", "You said: uno"]
    assert tree.api.message(tree.context_id, answer["message_id"])["parent_id"] is None
    assert tree.line("main") == ["one", "You said: one"]


def test_a_branch_of_an_empty_context_is_empty(tree: Tree) -> None:
    """There is no message to start from; the two then go their own ways."""
    branch = tree.make("other")
    assert (branch["from_message_id"], branch["leaf_message_id"]) == (None, None)
    one, two = tree.store("one"), tree.store("two", branch="other")
    assert (tree.ids("main"), tree.ids("other")) == ([one], [two])


def test_a_branch_may_start_after_an_open_message(open_message: tuple[str, str], api: Api) -> None:
    """While a turn writes: that goes on on its own branch, and the new one has the same message."""
    context_id, message_id = open_message
    tree = Tree(api, context_id)
    branch = tree.make("other")
    assert branch["leaf_message_id"] == message_id
    note = tree.store("note", branch="other")
    api.cancel(context_id)
    assert tree.ids("main") == [*tree.ids("other")[:-1]]
    assert tree.ids("other")[-2:] == [message_id, note]
    assert tree.messages("other")[-2]["status"] == "cancelled"


def test_the_same_again_makes_nothing(tree: Tree) -> None:
    """200 and the branch as it has become; no revision."""
    leaf = tree.store("one")
    for body in ({"name": "x"}, {"name": "y", "from_message_id": leaf}):
        ok(tree.post(body), 201)
        tree.store("more", branch=body["name"])
        before = tree.context()
        response = tree.post(body)
        assert ok(response) == tree.get(body["name"])
        assert "location" not in response.headers
        assert unchanged(tree, before)
    assert tree.names() == ["main", "x", "y"]


def test_a_name_that_means_another_place_is_taken(tree: Tree) -> None:
    """409 id_taken with the name; also main's, and by default once the active leaf has moved on."""
    first, second = tree.store("one"), tree.store("two")
    tree.make("x", from_message_id=first)
    before = tree.context()
    for body in (
        {"name": "x"},
        {"name": "x", "from_message_id": second},
        {"name": "x", "from_message_id": None},
        {"name": "x", "from_message_id": "unknown"},
        {"name": "main"},
    ):
        assert problem(tree.post(body), 409, "id_taken")["id"] == body["name"]
    assert unchanged(tree, before)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "x", "from_message_id": 5}, "from_message_id"),
        ({"name": "x", "from_message_id": ""}, "from_message_id"),
        ({"name": "x", "colour": "red"}, "colour"),
        ([], "body"),
    ],
)
def test_a_wrong_request_is_400(tree: Tree, body: Any, field: str) -> None:
    """It names the field, and makes nothing."""
    invalid(tree.post(body), field)
    assert tree.names() == ["main"]


@pytest.mark.parametrize("name", ["x" * 64, "a:b", "A.b_c-1", "0"])
def test_names_are_of_the_form_of_ids(tree: Tree, name: str) -> None:
    """Everywhere: in paths, in lists, to switch to and to delete."""
    tree.make(name)
    assert tree.get(name)["name"] == name
    assert tree.switch(name)["active_branch"] == name
    assert tree.messages(name) == []
    tree.switch("main")
    tree.delete(name)


def test_a_branch_cannot_start_where_there_is_no_place(api: Api, patient: Api) -> None:
    """message_not_found: unknown, of another context, queued, or no longer listed."""
    other = Tree(api, api.create()).store("elsewhere")
    tree = Tree(patient, patient.create())
    answer = patient.send(tree.context_id, script({"text": "a "}, {"error": "transient"}))
    patient.in_state(tree.context_id, "transient_failure")
    (broken,) = (m for m in patient.replies(tree.context_id, answer["turn_id"]))
    queued = patient.send(tree.context_id, "later")["message_id"]
    before = tree.context()
    for message_id in ("unknown", other, broken["id"], queued):
        response = tree.post({"name": "x", "from_message_id": message_id})
        assert problem(response, 404, "message_not_found")["message_id"] == message_id
    assert unchanged(tree, before)
    assert tree.names() == ["main"]
    patient.http.delete(f"/contexts/{tree.context_id}")


# Listing


def test_branches_are_paged_oldest_first(tree: Tree) -> None:
    """A page after the other, also when one of those listed goes in between."""
    names = ["main", *(f"b{n}" for n in range(5))]
    for name in names[1:]:
        tree.make(name)
    assert [branch["name"] for branch in tree.all(limit=2)] == names
    page = ok(tree.api.http.get(tree.path, params={"limit": 4}))
    assert [branch["name"] for branch in page["items"]] == names[:4]
    tree.delete("b2")
    rest = ok(tree.api.http.get(tree.path, params={"cursor": page["next_cursor"]}))
    assert [branch["name"] for branch in rest["items"]] == names[4:]
    assert rest["next_cursor"] is None


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("cursor=x", "cursor"),
        ("cursor=1.2", "cursor"),
        ("branch=main", "branch"),
        ("limit=1&limit=2", "limit"),
    ],
)
def test_a_wrong_parameter_of_the_list_is_400(tree: Tree, query: str, field: str) -> None:
    """And named."""
    invalid(tree.api.http.get(f"{tree.path}?{query}"), field)


def test_what_is_not_there_is_404(api: Api, tree: Tree) -> None:
    """The context or the branch, with what was asked for."""
    nowhere = Tree(api, "nowhere")
    for response in (
        api.http.get(nowhere.path),
        nowhere.post({"name": "x"}),
        nowhere.find("main"),
        nowhere.remove("main"),
        nowhere.ask_merge("main", {"source": "x"}),
    ):
        assert problem(response, 404, "context_not_found")["context_id"] == "nowhere"
    for name in ("nothing", "%20", "a%0a", "x" * 65):
        for response in (tree.find(name), tree.remove(name)):
            problem(response, 404, "branch_not_found")
    assert problem(tree.find("no"), 404, "branch_not_found")["branch"] == "no"


def test_other_methods_are_405(tree: Tree) -> None:
    """With what is possible there."""
    for path, allowed in (
        (tree.path, {"GET", "POST"}),
        (f"{tree.path}/main", {"GET", "DELETE"}),
        (f"{tree.path}/main/merge", {"POST"}),
    ):
        response = tree.api.http.put(path)
        problem(response, 405, "method_not_allowed")
        said = {name.strip() for name in response.headers["allow"].split(",")}
        assert allowed <= said <= allowed | {"OPTIONS", "HEAD"}


# Switching


def test_a_switch_is_of_the_view(tree: Tree) -> None:
    """Sends go to the active branch from then on; the branches say which it is."""
    tree.store("one")
    tree.make("x")
    before = tree.context()
    after = tree.switch("x")
    assert after["record_revision"] == after["revision"] == before["revision"] + 1
    assert [b["name"] for b in tree.all() if b["active"]] == ["x"]
    tree.api.run(tree.context_id, "two")
    assert tree.line("main") == ["one"]
    assert tree.line("x") == ["one", "two", "You said: two"]
    assert tree.api.messages(tree.context_id) == tree.messages("x")


def test_a_running_turn_stays_on_its_branch(tree: Tree) -> None:
    """Whatever is made, switched to or deleted beside it."""
    first = tree.store("one")
    answer = tree.api.send(tree.context_id, ENDLESS)
    reply = tree.api.opened(tree.context_id)["message_id"]
    tree.make("x", from_message_id=first)
    tree.make("y", from_message_id=first)
    tree.switch("x")
    tree.delete("y")
    note = tree.store("note")
    tree.api.cancel(tree.context_id)
    assert tree.api.turn(tree.context_id, answer["turn_id"])["branch"] == "main"
    assert tree.ids("main") == [first, answer["message_id"], reply]
    assert tree.ids("x") == [first, note]


def test_a_queued_turn_keeps_the_branch_that_was_active_when_it_was_sent(tree: Tree) -> None:
    """It is listed there, and runs there."""
    first = tree.store("one")
    tree.make("x")
    tree.api.send(tree.context_id, ENDLESS)
    queued = tree.api.send(tree.context_id, "two", branch="x")
    assert tree.ids("x") == [first, queued["message_id"]]
    tree.api.cancel(tree.context_id)
    turn = tree.api.ended(tree.context_id, queued["turn_id"])
    assert (turn["branch"], turn["status"]) == ("x", "completed")
    assert tree.line("x") == ["one", "two", "You said: two"]
    assert tree.get("x")["leaf_message_id"] == tree.ids("x")[-1]


# Forks through `parent_id`


def test_a_message_is_edited_and_sent_again(tree: Tree) -> None:
    """From what stood before it: a sibling on a branch of its own, which is listed like any."""
    tree.api.run(tree.context_id, "one")
    sent, _ = tree.api.run(tree.context_id, "tow")
    parent = tree.api.message(tree.context_id, sent["message_id"])["parent_id"]
    again, _ = tree.api.run(tree.context_id, "two", parent_id=parent, branch="fixed")
    fixed = tree.get("fixed")
    assert (fixed["active"], fixed["from_message_id"]) == (True, parent)
    assert tree.api.message(tree.context_id, again["message_id"])["parent_id"] == parent
    assert tree.line("fixed") == ["one", "You said: one", "two", "You said: two"]
    assert tree.line("main") == ["one", "You said: one", "tow", "You said: tow"]


def test_an_answer_is_made_anew(tree: Tree) -> None:
    """The same text from the same place, over and over: each answer is on its own branch."""
    first, _ = tree.api.run(tree.context_id, "one")
    branches = set()
    for _ in range(3):
        _, turn = tree.api.run(tree.context_id, "two", parent_id=first["message_id"])
        branches.add(turn["branch"])
    assert set(tree.names()) == {"main", *branches}
    assert len(branches) == 3
    for name in branches:
        assert tree.line(name) == ["one", "two", "You said: two"]
    assert tree.line("main") == ["one", "You said: one"]


def test_a_send_from_the_middle_of_a_turn(tree: Tree) -> None:
    """What came after that message in its turn is not on the new branch."""
    tree.api.run(tree.context_id, TWO_MESSAGES)
    thinking = tree.messages("main")[1]
    tree.api.run(tree.context_id, "else", parent_id=thinking["id"], branch="x")
    assert tree.line("x") == [TWO_MESSAGES, "hm ", "else", "You said: else"]
    assert tree.messages("x")[1] == thinking


def test_a_send_with_a_parent_takes_no_name_that_there_is(tree: Tree) -> None:
    """409 id_taken, and nothing is stored; a deleted name is free."""
    first = tree.store("one")
    tree.make("x")
    before = tree.context()
    response = tree.api.post_message(tree.context_id, "y", parent_id=first, branch="x")
    assert problem(response, 409, "id_taken")["id"] == "x"
    assert unchanged(tree, before)
    tree.delete("x")
    tree.api.run(tree.context_id, "y", parent_id=first, branch="x")
    assert tree.line("x") == ["one", "y", "You said: y"]


def test_forks_may_be_deep(tree: Tree) -> None:
    """A fork of a fork, a hundred and fifty times: each list is its line through the tree."""
    parent, line = tree.store("0"), ["0"]
    for n in range(1, 151):
        tree.make(f"b{n}", from_message_id=parent)
        parent = tree.store(str(n), branch=f"b{n}")
        line.append(str(n))
    assert tree.line("b150") == line
    listed = tree.messages("b150")
    for before, after in pairwise(listed):
        assert after["parent_id"] == before["id"]
    assert tree.line("b75") == line[:76]
    for n in range(1, 150):
        tree.delete(f"b{n}")
    assert tree.messages("b150") == listed
    answer = tree.merge("main", "b150")
    assert tree.line("main") == line
    assert len(answer["added"]) == 150


# Signals


def test_branches_are_part_of_the_record(tree: Tree) -> None:
    """Making, switching and deleting are each one `state_changed` with a new record revision."""
    tree.store("one")
    start = tree.context()["revision"]
    with tree.api.stream(tree.context_id) as stream:
        stream.current()
        for n, act in enumerate(
            (
                lambda: tree.make("x"),
                lambda: tree.switch("x"),
                lambda: tree.switch("main"),
                lambda: tree.delete("x"),
            ),
            start=1,
        ):
            act()
            frames = stream.until_state("idle", after=start + n - 1)
            assert [frame.type for frame in frames if frame.type != "heartbeat"] == [
                "state_changed"
            ]
            assert frames[-1]["revision"] == frames[-1]["record_revision"] == start + n


def test_since_revision_has_the_messages_of_all_branches(tree: Tree) -> None:
    """Whatever is active; a branch that is made or deleted changes no message."""
    tree.store("one")
    tree.make("x")
    revision = tree.context()["revision"]
    on_x, on_main = tree.store("two", branch="x"), tree.store("three")
    tree.make("y")
    tree.delete("x")
    changed = tree.api.messages(tree.context_id, since_revision=revision)
    assert ids(changed) == [on_x, on_main]


# The document


def test_the_document_describes_the_operations(api: Api) -> None:
    """Each with its good answers and its problems."""
    document = ok(api.http.get("/schema/openapi.json"))
    base = "/contexts/{context_id}/branches"
    for path, method, statuses in (
        (base, "get", {200, 400, 404}),
        (base, "post", {200, 201, 400, 404, 409, 413, 415}),
        (f"{base}/{{branch}}", "get", {200, 404}),
        (f"{base}/{{branch}}", "delete", {204, 404, 409}),
        (f"{base}/{{branch}}/merge", "post", {200, 400, 404, 409, 413, 415}),
    ):
        responses = document["paths"][path][method]["responses"]
        assert statuses <= {int(status) for status in responses}, (path, method)
    request = document["components"]["schemas"]["BranchRequest"]
    assert request["required"] == ["name"]
