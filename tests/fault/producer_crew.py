"""The producers of one context, each a process that is killed, frozen, started again or left dead."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from evidence import Evidence
from producer_ledger import Account, read_ledger
from producer_plan import ProducerPlan

PROCESS = Path(__file__).resolve().parent / "producer_process.py"


class Worker:
    """One producer: a process and those that came after it. `deserted`: it is not started again."""

    def __init__(self, plan: ProducerPlan, evidence: Evidence) -> None:
        self.plan = plan
        self.deserted = False
        self.frozen = False
        self._evidence = evidence
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._killing = False

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be expected of it."""
        started = self._process is not None
        return self.deserted or (started and not self.is_running and not self._killing)

    def account(self) -> Account:
        """What its ledger says now."""
        return read_ledger(self.plan.ledger)

    async def start(self) -> None:
        """A process; after a kill the next one."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PROCESS),
            self.plan.encoded(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(),
        )
        self._process, self._killing = process, False
        self._watch = asyncio.create_task(self._wait_for(process))

    async def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        self._killing = True
        self._send(signal.SIGKILL)
        if self._watch is not None:
            await self._watch
        self.frozen = False

    def freeze(self) -> None:
        """It stands still, with its connections open."""
        self.frozen = self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on as if nothing had been."""
        self._send(signal.SIGCONT)
        self.frozen = False

    def _send(self, number: signal.Signals) -> bool:
        """Whether there was a process to hear it."""
        if self._process is None or not self.is_running:
            return False
        with suppress(ProcessLookupError):  # it has just ended
            self._process.send_signal(number)
            return True
        return False

    async def _wait_for(self, process: asyncio.subprocess.Process) -> None:
        _, said = await process.communicate()
        if process.returncode != 0 and not self._killing:
            self._evidence.fault(
                "a producer that broke", by=self.plan.name, said=said.decode()[-2000:]
            )


def _environment() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CONTEXTD_")}
