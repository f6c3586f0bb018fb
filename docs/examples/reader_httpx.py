"""Shows a conversation as it is written, every character exactly once. Only httpx.

    python reader_httpx.py CONTEXT_ID

This is all there is to reading (§4.4): hold a sequence for each message, pull from it after a signal,
and come back with the last id. It ends when the context is deleted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx

BEGINNING = "0"  # a cursor that no server knows: every message is signalled (§4.1)


def follow(http: httpx.Client, context: str) -> Iterator[dict[str, Any]]:
    held: dict[str, int] = {}
    cursor = coming = BEGINNING
    while True:
        try:
            headers = {"Last-Event-ID": cursor}
            with http.stream("GET", f"{context}/stream", headers=headers) as stream:
                for line in stream.raise_for_status().iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "id":
                        coming = value
                    elif name == "data":
                        yield from pull(http, context, json.loads(value), held)
                    elif not line:
                        cursor = coming  # only now: what it stands for has been pulled
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 404:
                return
        except httpx.TransportError as error:
            print(f"\n[{type(error).__name__}]", file=sys.stderr)
        time.sleep(1)


def pull(
    http: httpx.Client, context: str, signal: dict[str, Any], held: dict[str, int]
) -> Iterator[dict[str, Any]]:
    message = signal.get("message_id")
    goal = signal.get("final_sequence", signal.get("current_sequence"))
    while message:
        params = {"from_sequence": held.get(message, 0)}
        url = f"{context}/messages/{message}/content"
        part = http.get(url, params=params).raise_for_status().json()
        if part["head_sequence"] < part["from_sequence"]:
            sys.exit("The server has lost text that was shown already. Start over.")
        held[message] = part["sequence"]
        yield part | {"role": signal["role"]}
        if part["sequence"] >= goal and (part["final"] or "final_sequence" not in signal):
            return
        if part["sequence"] == part["head_sequence"]:
            time.sleep(0.1)  # another process of the server may hear of the rest a little later


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a context's messages as they are written.")
    parser.add_argument("context_id")
    parser.add_argument("--url", default=os.environ.get("CONTEXTD_URL", "http://127.0.0.1:8600"))
    given = parser.parse_args()
    shown = None
    with httpx.Client(base_url=given.url, timeout=40) as http:  # seconds: more than two heartbeats
        for part in follow(http, f"/contexts/{given.context_id}"):
            if part["content"] and part["message_id"] != shown:
                print(f"{'' if shown is None else chr(10)}{part['role']}: ", end="")
                shown = part["message_id"]
            print(part["content"], end="", flush=True)
    print("\n[deleted]")


if __name__ == "__main__":
    main()
