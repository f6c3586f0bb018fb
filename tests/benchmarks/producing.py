"""Chunks from outside, durable: lines of long bodies, batches, and one chunk a request."""

import msgspec

from benchmarks.bare_commits import Options as BareOptions
from benchmarks.figures import Goal, Row, alternate, make_row
from benchmarks.processes import Running, answer, contextd_alone
from benchmarks.producers import Options, Shape
from benchmarks.scale import Scale

CONNECTIONS = 64
BATCH = 20
CHUNKS_AT_ONCE = (
    1000  # a writer of the bare loop beside bodies of lines: as many as contextd gathers
)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A way to produce. `bare_chunks` is what a writer of the bare loop appends at a time."""

    name: str
    what: str
    shape: Shape
    connections: int
    requests: int
    chunks: int
    bare_chunks: int
    goal: Goal


def measure_one_body(scale: Scale) -> Row:
    """One body of lines."""
    return measure(
        scale,
        Load(
            name="lines_1",
            what="durable 20-byte chunks of one NDJSON body, until it is answered",
            shape="lines",
            connections=1,
            requests=1,
            chunks=scale.produced_lines,
            bare_chunks=CHUNKS_AT_ONCE,
            goal=Goal(on="value", at_least=100_000),
        ),
    )


def measure_bodies(scale: Scale) -> Row:
    """Many bodies of lines at once."""
    return measure(
        scale,
        Load(
            name="lines_64",
            what=f"durable 20-byte chunks of {CONNECTIONS} NDJSON bodies at once, one a message",
            shape="lines",
            connections=CONNECTIONS,
            requests=1,
            chunks=scale.produced_lines // CONNECTIONS,
            bare_chunks=CHUNKS_AT_ONCE,
            goal=Goal(on="value", at_least=100_000),
        ),
    )


def measure_batches(scale: Scale) -> Row:
    """JSON batches."""
    return measure(
        scale,
        Load(
            name="batches",
            what=f"durable 20-byte chunks, {BATCH} a request, {CONNECTIONS} connections",
            shape="batches",
            connections=CONNECTIONS,
            requests=scale.produced_batches,
            chunks=BATCH,
            bare_chunks=BATCH,
            goal=Goal(on="ratio", at_least=0.2),
        ),
    )


def measure_posts(scale: Scale) -> Row:
    """A chunk a request."""
    return measure(
        scale,
        Load(
            name="posts",
            what=f"durable 20-byte chunks, one a request, {CONNECTIONS} connections",
            shape="posts",
            connections=CONNECTIONS,
            requests=scale.produced_posts,
            chunks=1,
            bare_chunks=1,
            goal=Goal(on="value", at_least=8000),
        ),
    )


class Generator:
    """Runs a load again and again, on messages of its own each time."""

    def __init__(self, server: Running, load: Load) -> None:
        self._server = server
        self._load = load
        self.cpu_us: list[dict[str, float]] = []  # of each run: what a chunk cost on either side

    def __call__(self) -> float:
        """Durable chunks a second of one run."""
        load = self._load
        options = Options(
            url=self._server.url,
            server_pid=self._server.child.pid,
            run=f"{load.name}-{len(self.cpu_us)}",
            shape=load.shape,
            connections=load.connections,
            requests=load.requests,
            chunks=load.chunks,
        )
        found = answer("producers", options)
        chunks = load.connections * load.requests * load.chunks
        self.cpu_us.append(
            {side: round(found[f"{side}_cpu_s"] / chunks * 1e6, 2) for side in ("server", "client")}
        )
        return float(chunks / found["seconds"])


def measure(scale: Scale, load: Load) -> Row:
    """The figure of one way to produce. The first run of contextd, which is its warm-up, is not in it."""
    bare = BareOptions(writers=load.connections, chunks=load.bare_chunks, seconds=scale.append_s)
    with contextd_alone() as contextd:
        generate = Generator(contextd, load)
        generate()
        rounds = alternate(
            scale.produced_rounds, generate, lambda: float(answer("bare_commits", bare))
        )
    return make_row(
        name=load.name,
        what=load.what,
        unit="chunks/s",
        limit_is=(
            "a bare group-commit loop: one held SQLAlchemy connection, one INSERT a commit, "
            f"{load.connections} writers of {load.bare_chunks} rows; no HTTP"
        ),
        goal=load.goal,
        rounds=rounds,
        detail={"cpu_us_per_chunk": generate.cpu_us[1:]},
    )
