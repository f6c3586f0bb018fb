"""Servers that are killed while turns call tools, people decide and external results come in (§8).

As in `KillRun`, and beside it every tool writes down that it was executed, so that what ran can be
compared with what was asked for, decided and stored: after each kill, and at the end of each
conversation.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from crowd import Crowd, Manners
from kill_run import OPERATIONS, KillRun
from raw_http import Connection
from tool_book import Book
from tool_calls_verdict import check_marks
from tool_conversation import ToolConversation
from tool_crowd import Place, ToolCrowd, check_answers_kept
from tool_rows import calls_by_status, check_calls_whole
from tool_script import TOOL_TIMEOUT_S
from verdict import check_whole
from witness import Witness

CROWDS = 5
WORK_S_MAX = 8.0
EXECUTIONS = (0, 1, 2, 4, 8)  # before one kill
BRIEF_SENDS = 2
HERE = Path(__file__).resolve().parent
MODULE = "tool_module"


class ToolRun(KillRun):
    """One run; used once. `brief`: short conversations. The rest as in `KillRun`."""

    states = (
        "processing_user_message",
        "awaiting_llm_response",
        "streaming_llm_response",
        "processing_llm_response",
        "processing_llm_response",
        "awaiting_tool_approval",
        "executing_tools",
        "executing_tools",
        "executing_tools",
        "awaiting_tool_results",
        "processing_tool_results",
        "processing_tool_results",
        "transient_failure",
        "queued",
    )
    moments: ClassVar[Mapping[str, int]] = {
        "while starting": 6,
        "right after the start": 5,
        "at random": 12,
        "in a state": 50,
        "at a message's end": 5,
        "during an operation": 22,
    }
    wait_s_max = 2.0
    look_s = 0.001
    operations = (*OPERATIONS, *("decide",) * 5, *("result",) * 5)

    def __init__(
        self,
        *,
        seed: str,
        folder: Path,
        url: str | None = None,
        servers: int = 1,
        crowds: int = CROWDS,
        settings: Mapping[str, object] | None = None,
        brief: bool = False,
    ) -> None:
        workspace = folder / "workspace"
        workspace.mkdir()
        tools = {"tools": MODULE, "workspace": workspace, "tool_timeout_s": TOOL_TIMEOUT_S}
        super().__init__(
            seed=seed,
            folder=folder,
            url=url,
            servers=servers,
            crowds=crowds,
            settings={**tools, **(settings or {})},
        )
        self._place = Place(Book(folder / "book"), workspace, set())
        self._brief = brief
        self._conversations: dict[str, ToolConversation] = {}

    async def run(self, kills: int, show: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Raises `AssertionError` with the seed when anything was wrong; else what was done."""
        with patch.dict(os.environ, {"PYTHONPATH": str(HERE)}):  # where the servers find MODULE
            return await super().run(kills, show)

    async def _cycle(self) -> None:
        await self._work()
        await super()._cycle()

    async def _cycle_of_several(self) -> None:
        await self._work()
        await super()._cycle_of_several()

    async def _work(self) -> None:
        """Until some tools were executed: on a slow machine a turn needs time to come to them."""
        await self._read_table()
        book = self._place.book
        choice = EXECUTIONS[:3] if self._brief else EXECUTIONS
        wanted = book.count() + self._random.choice(choice)
        deadline = time.monotonic() + WORK_S_MAX
        while book.count() < wanted and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _read_table(self) -> None:
        """The table of §5 as the server shows it; that it is the page's is tested elsewhere."""
        port = self._fleet.port()
        if self._place.table or port is None:
            return
        answer = await Connection(port).request("GET", "/machine")
        self._place.table.update(
            (row["trigger"], row["from_state"], row["to_state"])
            for row in answer.json()["transitions"]
        )

    def _new_crowd(self, name: str, manners: Manners) -> Crowd:
        crowd = ToolCrowd(
            self._world(),
            name,
            replace(manners, sends=BRIEF_SENDS) if self._brief else manners,
            self._place,
            seed=self._seed,
            operating=self._note_operation,
        )
        self._conversations[name] = crowd.conversation
        return crowd

    async def _compare(self, truth: Witness) -> None:
        await super()._compare(truth)
        for crowd in self._crowds:
            if isinstance(crowd, ToolCrowd):
                await check_answers_kept(truth, crowd.conversation)
        await check_calls_whole(truth, self.evidence)
        check_marks(self._place.book, self._conversations)

    async def _take_census(self, remains: Witness) -> None:
        await super()._take_census(remains)
        for status, count in (await calls_by_status(remains)).items():
            self.evidence.counts[f"calls found {status}"] += count

    async def _finish(self) -> None:
        await super()._finish()
        if self._several:
            await check_whole(self._truth, self.evidence)
            codes = await self._fleet.stop()
            if any(codes):
                self.evidence.fault("a server that did not stop cleanly", codes=codes)
        await check_calls_whole(self._truth, self.evidence)
        check_marks(self._place.book, self._conversations)
