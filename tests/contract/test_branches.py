"""Branches over SQLite and PostgreSQL: attempts that break, what the model sees, and a model of the tree."""

import random
from typing import Any

import pytest

from contextd.app import Contextd
from contextd.core.branch import Branch, BranchRequest, MergeAnswer, MergeRequest
from contextd.core.context import Context, ContextPatch, ContextRequest
from contextd.core.errors import BranchActive, BranchNotFound, IdTaken
from contextd.core.message import Message
from contextd.provider import FatalError, TransientError

from .conftest import HeldProvider, Start
from .test_turns import begin, idle, send, streaming, until

STEPS = 60


async def line(contextd: Contextd, branch: str) -> list[Message]:
    page = await contextd.service.messages.list(
        "a", branch=branch, cursor=None, limit=1000, include_content=True
    )
    return page.items


async def texts(contextd: Contextd, branch: str) -> list[Any]:
    return [message.content for message in await line(contextd, branch)]


async def make(contextd: Contextd, name: str, **start: Any) -> Branch:
    made, _ = await contextd.service.branches.create("a", BranchRequest(name=name, **start))
    return made


async def merge(contextd: Contextd, name: str, source: str, **more: Any) -> MergeAnswer:
    return await contextd.service.branches.merge("a", name, MergeRequest(source=source, **more))


async def store(contextd: Contextd, text: str, **options: Any) -> str:
    answer = await send(contextd, text, respond=False, **options)
    return str(answer.message_id)


def waiting(context: Context) -> bool:
    return context.state == "transient_failure"


async def test_a_branch_from_an_attempt_that_breaks_starts_before_it(
    start: Start, provider: HeldProvider
) -> None:
    """What the attempt wrote leaves all lists, also those of branches that were forked from it."""
    async with start(backoff_initial_s=60, backoff_max_s=60) as contextd:
        asked = await begin(contextd, provider)
        provider.say("half ")
        context = await until(contextd, lambda c: streaming(c) and bool(c.open_messages))
        broken = context.open_messages[0].message_id
        assert (await make(contextd, "x")).leaf_message_id == broken
        await make(contextd, "y", from_message_id=broken)
        note = await store(contextd, "note", branch="y")
        provider.say(TransientError("unreachable", "gone"))
        await until(contextd, waiting)
        for name, leaf in (("x", asked.message_id), ("y", note)):
            branch = await contextd.service.branches.get("a", name)
            assert (branch.from_message_id, branch.leaf_message_id) == (asked.message_id, leaf)
        assert await texts(contextd, "x") == ["Hello"]
        assert await texts(contextd, "y") == ["Hello", "note"]
        assert (await line(contextd, "y"))[1].parent_id == asked.message_id
        answer = await merge(contextd, "x", "y")
        assert (await texts(contextd, "x"), len(answer.added)) == (["Hello", "note"], 1)
        answer = await merge(contextd, "y", "x", message_ids=[broken])
        assert [entry.reason for entry in answer.left_out] == ["not_on_source"]


async def test_a_retry_on_a_branch_of_the_same_name_goes_on_after_the_message(
    start: Start, provider: HeldProvider
) -> None:
    """The name may mean another branch by now: as long as the message stands on it, it is answered."""
    async with start(backoff_initial_s=60, backoff_max_s=60) as contextd:
        await contextd.service.contexts.create(ContextRequest(id="a"))
        await make(contextd, "x")
        asked = await send(contextd, "Hello", branch="x")
        provider.say(FatalError("rejected", "no"))
        await until(contextd, lambda c: c.state == "failed")
        await contextd.service.branches.delete("a", "x")
        await make(contextd, "x", from_message_id=asked.message_id)
        await contextd.service.retries.retry("a")
        provider.say("half ")
        context = await until(contextd, lambda c: bool(c.open_messages))
        await make(contextd, "y", from_message_id=context.open_messages[0].message_id)
        provider.say(TransientError("unreachable", "gone"))
        await until(contextd, waiting)
        for name in ("x", "y"):
            branch = await contextd.service.branches.get("a", name)
            assert branch.from_message_id == branch.leaf_message_id == asked.message_id
            assert await texts(contextd, name) == ["Hello"]


async def test_the_model_sees_what_was_merged(start: Start, provider: HeldProvider) -> None:
    """Copies are part of the branch's conversation, in their place and with their text."""
    async with start() as contextd:
        await begin(contextd, provider)
        provider.say("one ", "two ", None)
        await until(contextd, idle)
        await make(contextd, "x", from_message_id=None)
        await store(contextd, "root", branch="x")
        await merge(contextd, "x", "main")
        await send(contextd, "more", branch="x")
        await provider.asked.wait()
        seen = [(m.role, m.content) for m in provider.requests[-1].history]
        assert seen == [
            ("user", "root"), ("user", "Hello"), ("assistant", "one two "), ("user", "more"),
        ]  # fmt: skip
        provider.say(None)
        await until(contextd, idle)


async def test_answers_that_were_merged_are_not_run_together(
    start: Start, provider: HeldProvider
) -> None:
    """Of two turns, without the questions between them: they stay two messages."""
    async with start() as contextd:
        await begin(contextd, provider)
        answers = []
        for text in ("one", "two"):
            provider.say(text, None)
            await until(contextd, idle)
            answers.append((await line(contextd, "main"))[-1].id)
            if text == "one":
                await send(contextd, "again")
        await make(contextd, "x", from_message_id=None)
        await merge(contextd, "x", "main", message_ids=answers)
        await send(contextd, "more", branch="x")
        await provider.asked.wait()
        seen = [(m.role, m.content) for m in provider.requests[-1].history]
        assert seen == [("assistant", "one"), ("assistant", "two"), ("user", "more")]
        provider.say(None)
        await until(contextd, idle)


class Model:
    """The tree as it should be: by id each message's parent and origin, by name each branch's leaf."""

    def __init__(self) -> None:
        self.parents: dict[str, str | None] = {}
        self.origins: dict[str, str] = {}
        self.leaves: dict[str, str | None] = {"main": None}
        self.starts: dict[str, str | None] = {"main": None}
        self.active = "main"

    def add(self, branch: str, id_: str, origin: str | None = None) -> None:
        self.parents[id_] = self.leaves[branch]
        self.origins[id_] = origin or id_
        self.leaves[branch] = id_

    def fork(self, name: str, start: str | None) -> None:
        self.leaves[name] = self.starts[name] = start

    def path(self, branch: str) -> list[str]:
        found, at = [], self.leaves[branch]
        while at is not None:
            found.append(at)
            at = self.parents[at]
        return found[::-1]

    def merged(
        self, target: str, source: str, named: list[str] | None
    ) -> tuple[list[str], set[str]]:
        """What goes over and what does not."""
        there = self.path(target)
        have = {self.origins[id_] for id_ in there}
        since = [id_ for id_ in self.path(source) if id_ not in there]
        if named is not None:
            since = [id_ for id_ in self.path(source) if id_ in named]
        added = [id_ for id_ in since if self.origins[id_] not in have]
        return added, set(since if named is None else named) - set(added)


@pytest.mark.parametrize("seed", range(4))
async def test_branches_are_as_a_simple_model_says(start: Start, seed: int) -> None:
    """Whatever is stored, forked, switched, deleted and merged, in any order."""
    chance, model = random.Random(seed), Model()
    async with start() as contextd:
        await contextd.service.contexts.create(ContextRequest(id="a"))
        for step in range(STEPS):
            await act(contextd, model, chance, step)
        await compare(contextd, model)


async def act(contextd: Contextd, model: Model, chance: random.Random, step: int) -> None:
    branch = chance.choice(list(model.leaves))
    other = chance.choice([f"b{n}" for n in range(6)])
    anywhere = chance.choice([None, *model.parents])
    match chance.choice(["store", "store", "store", "make", "send", "switch", "delete", "merge"]):
        case "store":
            model.add(branch, await store(contextd, f"t{step}", branch=branch))
        case "make" if other not in model.leaves:
            made = await make(contextd, other, from_message_id=anywhere)
            assert made.from_message_id == made.leaf_message_id == anywhere
            model.fork(other, anywhere)
        case "make" if model.starts[other] != anywhere:
            with pytest.raises(IdTaken):
                await make(contextd, other, from_message_id=anywhere)
        case "send" if anywhere is not None and other not in model.leaves:
            id_ = await store(contextd, f"t{step}", branch=other, parent_id=anywhere)
            model.fork(other, anywhere)
            model.add(other, id_)
            model.active = other
        case "switch":
            await contextd.service.contexts.patch("a", ContextPatch(active_branch=branch))
            model.active = branch
        case "delete":
            await delete(contextd, model, branch)
        case "merge" if other in model.leaves and other != branch:
            await merge_some(contextd, model, chance, branch, other)


async def delete(contextd: Contextd, model: Model, branch: str) -> None:
    if branch == model.active:
        with pytest.raises(BranchActive):
            await contextd.service.branches.delete("a", branch)
        return
    await contextd.service.branches.delete("a", branch)
    del model.leaves[branch], model.starts[branch]
    with pytest.raises(BranchNotFound):
        await contextd.service.branches.get("a", branch)


async def merge_some(
    contextd: Contextd, model: Model, chance: random.Random, target: str, source: str
) -> None:
    named = None
    if model.parents and chance.random() < 0.3:
        named = chance.sample(list(model.parents), min(4, len(model.parents)))
    added, left_out = model.merged(target, source, named)
    answer = await merge(contextd, target, source, message_ids=named)
    assert len(answer.added) == len(added)
    assert {entry.message_id for entry in answer.left_out} == left_out
    for of, copy in zip(added, answer.added, strict=True):
        model.add(target, copy, model.origins[of])


async def compare(contextd: Contextd, model: Model) -> None:
    for name, leaf in model.leaves.items():
        listed = await line(contextd, name)
        assert [message.id for message in listed] == model.path(name)
        assert [message.parent_id for message in listed] == [
            model.parents[message.id] for message in listed
        ]
        for message in listed:
            origin = await contextd.service.content.pull(
                "a", model.origins[message.id], start=0, end=None
            )
            assert message.content == origin.content
        branch = await contextd.service.branches.get("a", name)
        assert (branch.leaf_message_id, branch.from_message_id) == (leaf, model.starts[name])
        assert branch.active is (name == model.active)
    page = await contextd.service.branches.list("a", cursor=None, limit=100)
    assert {branch.name for branch in page.items} == set(model.leaves)
    assert (await contextd.service.contexts.get("a")).message_count == len(model.parents)
