"""Branches with `Client` and `SyncClient`, against a real server (§9)."""

import pytest
from serving import Server

from contextd.client import ApiError, Client, SyncClient


@pytest.fixture
async def context_id(real: Client) -> str:
    return (await real.create_context()).id


async def texts(client: Client, context_id: str, branch: str) -> list[object]:
    found = client.messages(context_id, content=True, branch=branch)
    return [message.content async for message in found]


async def test_a_branch_is_made_switched_to_merged_and_deleted(
    real: Client, context_id: str
) -> None:
    """A whole life, with the answers as types."""
    root = (await real.send(context_id, "root", respond=False)).message_id
    made = await real.create_branch(context_id, "try")
    assert (made.name, made.active, made.from_message_id) == ("try", False, root)
    assert await real.create_branch(context_id, "try", from_message_id=root) == made
    await real.update_context(context_id, active_branch="try")
    stored = (await real.send(context_id, "more", respond=False)).message_id
    found = await real.get_branch(context_id, "try")
    assert (found.active, found.leaf_message_id) == (True, stored)
    answer = await real.merge(context_id, "main", "try")
    assert (len(answer.added), answer.left_out) == (1, [])
    again = await real.merge(context_id, "main", "try")
    assert [(entry.message_id, entry.reason) for entry in again.left_out] == [
        (stored, "already_there")
    ]
    assert await texts(real, context_id, "main") == ["root", "more"]
    await real.update_context(context_id, active_branch="main")
    await real.delete_branch(context_id, "try")
    assert [branch.name async for branch in real.branches(context_id)] == ["main"]


async def test_an_empty_branch_and_named_messages(real: Client, context_id: str) -> None:
    """`empty` starts at nothing; a merge takes those that are named, which may be none."""
    ids = [
        (await real.send(context_id, text, respond=False)).message_id for text in ("a", "b", "c")
    ]
    made = await real.create_branch(context_id, "anew", empty=True)
    assert (made.from_message_id, made.leaf_message_id) == (None, None)
    assert (await real.merge(context_id, "anew", "main", [])).added == []
    await real.merge(context_id, "anew", "main", [ids[2], ids[0]])
    assert await texts(real, context_id, "anew") == ["a", "c"]


@pytest.mark.parametrize("name", ["...", ".a", "a:b"])
async def test_every_legal_name_reaches_the_server(
    real: Client, context_id: str, name: str
) -> None:
    """Also with what URLs give a meaning to; `.` and `..`, which they know as folders, are none."""
    await real.create_branch(context_id, name)
    assert (await real.get_branch(context_id, name)).name == name
    await real.create_branch(context_id, "y", empty=True)
    assert (await real.merge(context_id, name, "y")).added == []
    await real.delete_branch(context_id, name)
    assert [branch.name async for branch in real.branches(context_id)] == ["main", "y"]


async def test_refusals_have_their_facts(real: Client, context_id: str) -> None:
    """Codes and facts are in the error."""
    with pytest.raises(ApiError) as caught:
        await real.delete_branch(context_id, "main")
    assert (caught.value.status, caught.value.code) == (409, "branch_active")
    assert caught.value.problem["branch"] == "main"
    for asked in (
        real.get_branch(context_id, "no"),
        real.merge(context_id, "main", "no"),
        real.delete_branch(context_id, "no"),
    ):
        with pytest.raises(ApiError) as caught:
            await asked
        assert (caught.value.code, caught.value.problem["branch"]) == ("branch_not_found", "no")


async def test_branches_are_listed_over_all_pages(real: Client, context_id: str) -> None:
    """The iterator follows the cursor to the end: a page has a hundred."""
    for n in range(101):
        await real.create_branch(context_id, f"b{n}")
    names = [branch.name async for branch in real.branches(context_id)]
    assert names == ["main", *(f"b{n}" for n in range(101))]


def test_without_await(server: Server) -> None:
    """The same methods of the synchronous client."""
    with SyncClient(server.url) as client:
        context_id = client.create_context().id
        client.create_branch(context_id, "x")
        client.send(context_id, "one", respond=False, branch="x")
        assert len(client.merge(context_id, "main", "x").added) == 1
        assert client.get_branch(context_id, "x").active is False
        client.delete_branch(context_id, "x")
        assert [branch.name for branch in client.branches(context_id)] == ["main"]
