"""Serves the Durable Streams protocol from Python, under the options of contextd: a folder for its data.

Run by a Python that has rakaia-streams, uvicorn, uvloop and httptools, and not contextd.
"""

import sys

from rakaia import JsonlStreamStore, create_app  # type: ignore[import-not-found]

from benchmarks.bare_hosting import host

if __name__ == "__main__":
    host(create_app(store=JsonlStreamStore(sys.argv[1])))
