"""Shows a conversation as it is written, each character exactly once: python reader.py CONTEXT_ID"""

import argparse
import asyncio
import os

from contextd.client import DEFAULT_URL, Client, Text

parser = argparse.ArgumentParser(description="Show a context's messages as they are written.")
parser.add_argument("context_id")
parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", DEFAULT_URL))


async def read(context_id: str, url: str) -> None:
    async with Client(url) as client:
        async for event in client.follow(context_id, cursor="0"):  # from the very beginning
            if isinstance(event, Text):
                print(event.content, end="", flush=True)


asyncio.run(read(**vars(parser.parse_args())))
