"""Keeps what a Pydantic AI agent streams while your own code goes on reading it.

    python wrap_pydantic_ai.py "What is in the pantry?"

The framework's test model answers, so it needs no key and no network.
"""

import argparse
import asyncio
import os

from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

from contextd.client import DEFAULT_URL, Client

ANSWER = "There are two jars of honey and a bag of rice in the pantry."


async def ask(url: str, prompt: str) -> None:
    agent = Agent(TestModel(custom_output_text=ANSWER))
    async with Client(url) as client:
        context = await client.create_context(title="Pydantic AI")
        print(f"context {context.id}")
        await client.send(context.id, prompt, respond=False)  # kept; contextd asks no model
        async with agent.run_stream(prompt) as run:
            pieces = run.stream_text(delta=True, debounce_by=None)  # each as it comes
            async for piece in client.wrap(context.id, pieces):
                print(piece, end="", flush=True)
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep what a Pydantic AI agent streams.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", DEFAULT_URL))
    given = parser.parse_args()
    asyncio.run(ask(given.url, given.prompt))


if __name__ == "__main__":
    main()
