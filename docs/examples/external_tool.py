"""Runs a tool that a context declares: python external_tool.py CONTEXT_ID (§8)"""

import argparse
import asyncio
import os

from contextd.client import DEFAULT_URL, ApiError, Client
from contextd.core.signal import StateChanged

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Says what the weather is.", "parameters": CITY}
STATES = {"executing_tools", "awaiting_tool_results"}  # before, other calls may be undecided

parser = argparse.ArgumentParser(description="Answer a context's calls of get_weather.")
parser.add_argument("context_id")
parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", DEFAULT_URL))


def get_weather(city: str) -> str:
    return f"Rain in {city}, 7 degrees."


async def answer(client: Client, context_id: str) -> None:
    async for call in client.tool_calls(context_id, statuses=["approved"]):
        if call.name == TOOL["name"] and call.arguments is not None:
            print(f"call {call.id}", flush=True)
            try:
                await client.post_result(context_id, call.id, get_weather(**call.arguments))
            except ApiError as error:
                if error.status != 409:  # the turn was cancelled meanwhile, or a twin was faster
                    raise


async def work(context_id: str, url: str) -> None:
    async with Client(url) as client:
        await client.create_context(id=context_id, tools=[{**TOOL, "external": True}])
        print(f"context {context_id}", flush=True)
        async for told in client.signals(context_id):
            if isinstance(told, StateChanged) and told.new_state in STATES:
                await answer(client, context_id)


asyncio.run(work(**vars(parser.parse_args())))
