"""Calls of tools, decisions, results and workflows with `Client` and `SyncClient` (§8, §3.1)."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from book import is_state
from serving import Server

from contextd.client import (
    ApiError,
    Client,
    FileReferencePayload,
    SyncClient,
    TextPayload,
    ToolDecision,
    WorkflowPayload,
)
from contextd.core.tool_call import ToolCall

ASK = {
    "name": "ask",
    "description": "Asks somebody.",
    "parameters": {
        "type": "object",
        "properties": {"question": {"type": "string"}},
        "required": ["question"],
    },
    "external": True,
    "requires_approval": True,
}
REVIEW = "---\ntitle: Review\nparameters:\n  topic: {type: string}\n---\nReview {{ topic }}.\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with a workspace and a workflow."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "flows").mkdir()
    (folder / "flows" / "review.md").write_text(REVIEW)
    (folder / "plan.md").write_text("Buy tea.\n")
    settings = {"scripted_rate": 0, "workspace": folder, "workflows": folder / "flows"}
    with Server(folder / "contextd.db", settings=settings) as running:
        yield running


def asking(*questions: str) -> str:
    """A script with a call for each question."""
    calls = [{"tool_call": {"name": "ask", "arguments": {"question": q}}} for q in questions]
    return json.dumps({"script": [*calls, {"text": "done"}]})


async def reach(client: Client, context_id: str, state: str) -> None:
    async with aclosing(client.follow(context_id)) as events:
        async for event in events:
            if is_state(state)(event):
                return


async def asked(client: Client, *questions: str, **fields: Any) -> tuple[str, list[ToolCall]]:
    """A new context whose calls wait for a person."""
    context_id = (await client.create_context(tools=[ASK], **fields)).id
    await client.send(context_id, asking(*questions))
    await reach(client, context_id, "awaiting_tool_approval")
    return context_id, await listed(client, context_id)


async def listed(client: Client, context_id: str, *statuses: str) -> list[ToolCall]:
    return [call async for call in client.tool_calls(context_id, statuses=statuses)]


async def text_of(client: Client, call: ToolCall) -> str:
    assert call.result_message_id is not None
    return (await client.pull(call.context_id, call.result_message_id)).content


async def test_calls_are_listed_over_all_pages(real: Client) -> None:
    """Oldest first, beyond the fifty of a page; `statuses` keeps some of them."""
    questions = [f"question {number}" for number in range(52)]
    policy = {"max_calls": 60}
    context_id, calls = await asked(real, *questions, approval_policy=policy)
    assert [call.arguments for call in calls] == [{"question": each} for each in questions]
    await real.deny(context_id, calls[0].id)
    pending = await listed(real, context_id, "pending")
    assert [call.id for call in pending] == [call.id for call in calls[1:]]
    assert len(await listed(real, context_id, "pending", "denied")) == 52
    assert await listed(real, context_id, "succeeded") == []


async def test_an_approved_call_gets_its_result(real: Client) -> None:
    """With other arguments than the model's; the turn goes on with what was posted."""
    context_id, (call,) = await asked(real, "why")
    answer = await real.approve(context_id, call.id, arguments={"question": "why not"})
    assert answer.state in {"executing_tools", "awaiting_tool_results"}
    (approved,) = await listed(real, context_id, "approved")
    assert approved.arguments == {"question": "why not"}
    await real.post_result(context_id, call.id, "Because.")
    await reach(real, context_id, "idle")
    (ended,) = await listed(real, context_id)
    assert (ended.status, await text_of(real, ended)) == ("succeeded", "Because.")


async def test_a_denied_call_tells_the_reason(real: Client) -> None:
    """To the model, in the call's result."""
    context_id, (call,) = await asked(real, "why")
    await real.deny(context_id, call.id, reason="Nobody knows.")
    await reach(real, context_id, "idle")
    (denied,) = await listed(real, context_id)
    assert denied.status == "denied"
    assert "Nobody knows." in await text_of(real, denied)


async def test_several_are_decided_at_once(real: Client) -> None:
    """All or none: one that cannot be decided leaves the others as they were."""
    context_id, (first, second) = await asked(real, "a", "b")
    decisions = [
        ToolDecision(tool_call_id=first.id, decision="approve"),
        ToolDecision(tool_call_id=second.id, decision="deny"),
    ]
    unknown = ToolDecision(tool_call_id="unknown", decision="deny")
    with pytest.raises(ApiError) as caught:
        await real.decide(context_id, [*decisions, unknown])
    assert caught.value.code == "tool_call_not_found"
    assert len(await listed(real, context_id, "pending")) == 2
    await real.decide(context_id, decisions)
    await reach(real, context_id, "awaiting_tool_results")
    assert [call.status for call in await listed(real, context_id)] == ["approved", "denied"]


async def test_a_result_can_be_an_error(real: Client) -> None:
    """The call has failed, with the tool's own words."""
    context_id, (call,) = await asked(real, "why")
    await real.approve(context_id, call.id)
    await reach(real, context_id, "awaiting_tool_results")
    await real.post_result(context_id, call.id, "No idea.", is_error=True)
    (failed,) = await listed(real, context_id)
    assert (failed.status, failed.error) == ("failed", "tool_error")
    assert await text_of(real, failed) == "No idea."


async def test_refusals_are_errors(real: Client) -> None:
    """A result too early, arguments that do not fit, another decision than before."""
    context_id, (call, other) = await asked(real, "a", "b")
    with pytest.raises(ApiError) as caught:
        await real.post_result(context_id, call.id, "x")
    assert caught.value.code == "illegal_transition"
    with pytest.raises(ApiError) as caught:
        await real.approve(context_id, call.id, arguments={"question": 1})
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
    await real.deny(context_id, call.id)
    with pytest.raises(ApiError) as caught:
        await real.approve(context_id, call.id)
    assert (caught.value.status, caught.value.code) == (409, "tool_call_decided")
    assert (await listed(real, context_id, "pending")) == [other]


class Losing(httpx.AsyncBaseTransport):
    """The first answer to each POST is lost on its way back."""

    def __init__(self) -> None:
        self._network = httpx.AsyncHTTPTransport()
        self.lost: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._network.handle_async_request(request)
        if request.method == "POST" and request.url.path not in self.lost:
            self.lost.append(request.url.path)
            await response.aread()
            raise httpx.ReadError("cut")
        return response

    async def aclose(self) -> None:
        await self._network.aclose()


@pytest.fixture
async def losing(server: Server) -> AsyncIterator[tuple[Client, Losing]]:
    transport = Losing()
    async with Client(server.url, transport=transport) as client:
        yield client, transport


async def test_a_lost_answer_is_asked_for_again(
    real: Client, losing: tuple[Client, Losing]
) -> None:
    """What was decided or posted the first time counts once."""
    client, transport = losing
    context_id, (call,) = await asked(real, "why")
    await client.approve(context_id, call.id, arguments={"question": "who"})
    await client.post_result(context_id, call.id, "Me.")
    await reach(real, context_id, "idle")
    assert [path.rsplit("/", 1)[1] for path in transport.lost] == ["decisions", "result"]
    (ended,) = await listed(real, context_id)
    assert (ended.status, await text_of(real, ended)) == ("succeeded", "Me.")
    results = [m async for m in real.messages(context_id) if m.kind == "tool_result"]
    assert len(results) == 1


async def test_every_payload_can_be_sent(real: Client, losing: tuple[Client, Losing]) -> None:
    """Files, workflows and texts with a display, also where the first answer is lost."""
    context_id = (await real.create_context()).id
    sent = [
        FileReferencePayload(paths=["plan.md"], display_text="The plan."),
        WorkflowPayload(workflow="review", parameters={"topic": "tea"}),
        TextPayload(content="long", display="short"),
        "plain",
    ]
    for payload in sent:
        await losing[0].send(context_id, payload, respond=False)
    messages = [message async for message in real.messages(context_id, content=True)]
    kept = [message for message in messages if message.role == "user"]
    assert [message.kind for message in kept] == ["file_reference", "workflow", "text", "text"]
    assert kept[1].content == "Review tea."
    assert [message.metadata.get("display") for message in kept] == [
        "The plan.", None, "short", None
    ]  # fmt: skip
    assert len(losing[1].lost) == 1


async def test_workflows_are_listed(real: Client) -> None:
    """With their parameters."""
    (workflow,) = [each async for each in real.workflows()]
    assert (workflow.name, workflow.title, workflow.error) == ("review", "Review", None)
    assert [parameter.name for parameter in workflow.parameters] == ["topic"]


def test_without_await(server: Server) -> None:
    """The same methods of the synchronous client."""
    with SyncClient(server.url) as client:
        context_id = client.create_context(tools=[ASK]).id
        turn_id = client.send(context_id, asking("a", "b", "c")).turn_id
        for event in client.follow(context_id):
            if is_state("awaiting_tool_approval")(event):
                break
        first, second, third = client.tool_calls(context_id, statuses=["pending"])
        client.approve(context_id, first.id)
        client.deny(context_id, second.id, reason="no")
        client.decide(context_id, [ToolDecision(tool_call_id=third.id, decision="deny")])
        for event in client.follow(context_id):
            if is_state("awaiting_tool_results")(event):
                break
        client.post_result(context_id, first.id, "A.")
        for event in client.follow(context_id):
            if is_state("idle")(event):
                break
        statuses = [call.status for call in client.tool_calls(context_id)]
        assert statuses == ["succeeded", "denied", "denied"]
        assert client.get_turn(context_id, str(turn_id)).status == "completed"
        assert [workflow.name for workflow in client.workflows()] == ["review"]
