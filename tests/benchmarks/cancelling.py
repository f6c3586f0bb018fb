"""Milliseconds from a cancel's request until the turn's work has stopped, in each state (§6)."""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from benchmarks.figures import Goal, Round, Row, make_row, percentile
from benchmarks.held_model import HeldModel
from benchmarks.processes import Command
from benchmarks.scale import Scale

POLL_S = 0.002
WAIT_S = 30.0
ASK: Final = {
    "name": "ask", "description": "Asks somebody.", "parameters": {}, "external": True,
}  # fmt: skip
# A state, how a context is brought there, and what of its work is seen to stop.
STATES: Final[dict[str, dict[str, Any]]] = {
    "awaiting_llm_response": {"model": "silent"},
    "streaming_llm_response": {"model": "speaks"},
    "executing_tools": {"steps": ["hold"]},
    "awaiting_tool_approval": {"steps": ["hold"], "policy": {"mode": "manual"}},
    "awaiting_tool_results": {"steps": ["ask"]},
    "transient_failure": {"error": "transient"},
}


def measure(scale: Scale) -> Row:
    """The figure: the 99th percentile over all states, beside that of one plain transaction."""
    stopped, plain = asyncio.run(_measure(scale.cancels))
    everything = [one["stopped_ms"] for found in stopped.values() for one in found]
    return make_row(
        name="cancelling",
        what=f"p99 from a cancel to the end of the turn's work, {scale.cancels} in each state",
        unit="ms",
        limit_is="a PATCH of a title: one transaction",
        goal=Goal(on="value", at_most=250),
        rounds=[Round(percentile(everything, 0.99), percentile(plain, 0.99))],
        detail={state: _of_state(found) for state, found in stopped.items()},
    )


def _of_state(found: list[dict[str, float]]) -> dict[str, float]:
    return {
        f"{what}_{share}": round(percentile([one[f"{what}_ms"] for one in found], at), 1)
        for what in ("answered", "stopped")
        for share, at in (("p50", 0.5), ("p99", 0.99))
    }


async def _measure(cancels: int) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    async with HeldModel.serving() as model, _contextd(model) as (http, folder):
        stopped: dict[str, list[dict[str, float]]] = {}
        plain = []
        for state, way in STATES.items():
            stopped[state] = []
            for number in range(cancels):
                case = _Case(http, model, folder / f"{state}-{number}", f"{state}.{number}")
                plain.append(await case.begin(state, way))
                stopped[state].append(await case.cancel(state))
        return stopped, plain


class _Case:
    """One context, cancelled once."""

    def __init__(self, http: httpx.AsyncClient, model: HeldModel, mark: Path, id_: str) -> None:
        self._http = http
        self._model = model
        self._mark = mark  # where the tool says that it was stopped
        self._id = id_
        self._path = f"/contexts/{id_}"

    async def begin(self, state: str, way: dict[str, Any]) -> float:
        """Brings it into the state; the milliseconds of a plain transaction before."""
        context = {
            "id": self._id,
            "provider": "openai" if "model" in way else "scripted",
            "tools": ["hold", ASK],
            "approval_policy": way.get("policy", {}),
        }
        (await self._http.post("/contexts", json=context)).raise_for_status()
        started = time.perf_counter()
        (await self._http.patch(self._path, json={"title": "plain"})).raise_for_status()
        plain_ms = (time.perf_counter() - started) * 1000
        text = way.get("model") or self._script(way)
        body = {
            "payload": {
                "type": "text",
                "content": f"{text} {self._id}" if way.get("model") else text,
            }
        }
        (await self._http.post(f"{self._path}/messages", json=body)).raise_for_status()
        await self._reach(state)
        return plain_ms

    async def cancel(self, state: str) -> dict[str, float]:
        """Milliseconds to the answer, and to the end of the work."""
        began = time.time()
        answer = (await self._http.post(f"{self._path}/cancel")).json()
        answered = time.time()
        assert answer["state"] == "idle", answer
        ended = answered
        if state.endswith("llm_response"):
            ended = await self._model.closed(self._id)
        elif state == "executing_tools":
            ended = await self._stopped_tool()
        return {
            "answered_ms": (answered - began) * 1000,
            "stopped_ms": (max(answered, ended) - began) * 1000,
        }

    def _script(self, way: dict[str, Any]) -> str:
        steps: list[dict[str, Any]] = [
            {"tool_call": {"name": name, "arguments": {"mark": str(self._mark)}}}
            for name in way.get("steps", ())
        ]
        if "error" in way:
            steps.append({"error": way["error"]})
        return msgspec.json.encode({"script": steps}).decode()

    async def _reach(self, state: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self._http.get(self._path)).json()["state"] != state:
                await asyncio.sleep(POLL_S)
            while state == "executing_tools" and not self._mark.exists():
                await asyncio.sleep(POLL_S)
            if state.endswith("llm_response"):
                await self._model.asked(self._id)

    async def _stopped_tool(self) -> float:
        async with asyncio.timeout(WAIT_S):
            while not (said := self._mark.read_text()):
                await asyncio.sleep(POLL_S)
        return float(said)


@asynccontextmanager
async def _contextd(model: HeldModel) -> AsyncIterator[tuple[httpx.AsyncClient, Path]]:
    with tempfile.TemporaryDirectory() as name:
        environ = {
            "CONTEXTD_DATABASE": f"sqlite+aiosqlite:///{name}/contextd.db",
            "CONTEXTD_PORT": "0",
            "CONTEXTD_LOG_LEVEL": "error",
            "CONTEXTD_TOOLS": "benchmarks.held_tools",
            "CONTEXTD_OPENAI_BASE_URL": model.url,
            "CONTEXTD_MODEL": "held",
            "CONTEXTD_BACKOFF_INITIAL_S": "30",
            "CONTEXTD_BACKOFF_MAX_S": "30",
            "PYTHONUNBUFFERED": os.environ.get("PYTHONUNBUFFERED", "1"),
        }
        with Command([sys.executable, "-m", "contextd", "serve"], environ=environ) as server:
            async with httpx.AsyncClient(base_url=server.read_url(), timeout=WAIT_S) as http:
                yield http, Path(name)
