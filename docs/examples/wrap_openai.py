"""Keeps the stream of the official OpenAI SDK while your own code goes on reading it.

    OPENAI_API_KEY=… python wrap_openai.py "Say hello."

`OPENAI_BASE_URL` points it at any other server that speaks the Chat Completions API.
"""

import argparse
import asyncio
import os

from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk

from contextd.client import DEFAULT_URL, Client


def text_of(event: ChatCompletionChunk) -> str | None:
    """The text in an event; none in those that carry only a role or the usage."""
    return event.choices[0].delta.content if event.choices else None


async def ask(url: str, model: str, prompt: str) -> None:
    async with Client(url) as client, AsyncOpenAI() as openai:
        context = await client.create_context(title="OpenAI")
        print(f"context {context.id}")
        await client.send(context.id, prompt, respond=False)  # kept; contextd asks no model
        stream = await openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], stream=True
        )
        async with stream:
            async for event in client.wrap(context.id, stream, text=text_of):
                print(text_of(event) or "", end="", flush=True)  # the SDK's event, untouched
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep what an OpenAI model streams.")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="gpt-4.1-mini")
    parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", DEFAULT_URL))
    given = parser.parse_args()
    asyncio.run(ask(given.url, given.model, given.prompt))


if __name__ == "__main__":
    main()
