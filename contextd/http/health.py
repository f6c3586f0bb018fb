"""Whether the server lives, whether it can work, and its figures (§12)."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Literal, Protocol

import msgspec
from litestar import MediaType, Response, get
from litestar.datastructures import State
from litestar.openapi.datastructures import ResponseSpec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from contextd.core.errors import ContextdError, Overloaded
from contextd.http.documented import refuses, tagged
from contextd.service import Service
from contextd.store.readiness import WRITES

ANSWER_S = 3.0  # that the database has, before the server is not ready


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The server's word on itself."""

    status: Literal["ok"] = "ok"


class TurnFigures(Protocol):
    """What the agent loop counts, whoever it is."""

    retries: int
    first_chunk: Histogram

    @property
    def running(self) -> int:
        """Turns that this process works on."""
        ...


class Figures:
    """Collected when `/metrics` is asked, from counts that the rooms keep anyway: no hot path pays."""

    def __init__(self, service: Service, turns: TurnFigures) -> None:
        self._service = service
        self._turns = turns

    def collect(self) -> Iterable[Metric]:
        """The metrics, all prefixed `contextd_`."""
        ledger = self._service.ledger
        hub, writer = ledger.hub, ledger.writer
        for name, text, value in (
            ("streams_open", "Streams of signals that are open", hub.reader_count),
            ("turns_running", "Turns that this process works on", self._turns.running),
            ("writer_queue_length", "Writes that wait for the next commit", writer.queue_length),
            ("tail_bytes", "Memory held by the live tail, about", ledger.tail.weight_bytes),
        ):
            yield GaugeMetricFamily(f"contextd_{name}", text, value=value)
        for name, text, value in (
            ("commits", "Transactions committed by the writer", writer.commits),
            ("chunks_written", "Chunks made durable", writer.chunks_written),
            ("turn_retries", "Requests to the model that were tried again", self._turns.retries),
            ("signals_sent", "Frames of signals sent", hub.stats.frames_sent),
            ("signals_merged", "Signals merged into a newer one", hub.stats.merged),
            ("slow_readers", "Readers disconnected for taking nothing", hub.stats.slow_disconnects),
        ):
            yield CounterMetricFamily(f"contextd_{name}", text, value=value)
        yield _by_outcome("turns", "Turns that ended here, by how", ledger.turn_outcomes)
        yield _by_outcome("tool_calls", "Tool calls that ended here, by how", ledger.call_outcomes)
        for metric in self._turns.first_chunk.collect():
            # When the counting began is not asked for, and would be a metric of its own.
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


def _by_outcome(name: str, text: str, outcomes: Counter[str]) -> Metric:
    family = CounterMetricFamily(f"contextd_{name}", text, labels=["outcome"])
    for outcome, count in outcomes.items():
        family.add_metric([outcome], count)
    return family


def make_registry(service: Service, turns: TurnFigures) -> CollectorRegistry:
    """A registry of this server alone, so that two in one process do not mix."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Figures(service, turns))
    return registry


@get("/health/live", responses=refuses())
async def live() -> Health:
    """The process answers."""
    return Health()


@get("/health/ready", responses=refuses(503))
async def ready(state: State) -> Health:
    """Reads are answered and writes are being taken; else the reason why not."""
    writer = state.service.ledger.writer
    if not writer.alive:
        raise Overloaded("Writes are not being taken.")
    if writer.stuck:
        raise Overloaded("The database takes too long over a write.")
    writer.look()
    with suppress(ContextdError):  # the reason says it
        if writer.readiness.lacks(WRITES):
            await _answered(writer.probe)  # it may be over, with nobody writing since
    if (reason := writer.readiness.reason) is not None:
        raise Overloaded(reason)
    await _answered(state.reader.ping)
    return Health()


async def _answered(ask: Callable[[], Awaitable[None]]) -> None:
    try:
        async with asyncio.timeout(ANSWER_S):
            await ask()
    except (TimeoutError, ContextdError):
        raise Overloaded("The database does not answer.") from None


@get(
    "/metrics",
    media_type=MediaType.TEXT,
    responses={
        200: ResponseSpec(str, media_type=CONTENT_TYPE_PLAIN_0_0_4, generate_examples=False),
        **refuses(),
    },
)
async def metrics(state: State) -> Response[bytes]:
    """Figures in Prometheus' text format."""
    return Response(
        generate_latest(state.registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4}
    )


HANDLERS = tagged("operation", live, ready, metrics)
