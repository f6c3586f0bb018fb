"""What a stream costs while nothing happens: resident memory of the server per reader."""

import psutil  # type: ignore[import-untyped]

from benchmarks.figures import Goal, Round, Row, make_row
from benchmarks.holding import Options
from benchmarks.processes import Child, Running, both_servers
from benchmarks.scale import Scale

CONTEXTS = 50
WARM_STREAMS = 20


def measure(scale: Scale) -> Row:
    """The figure."""
    rounds = []
    for _ in range(scale.idle_rounds):
        with both_servers("bare_stream") as (contextd, bare):
            kib = kib_per_reader(contextd, scale.idle_readers)
            rounds.append(Round(kib, kib_per_reader(bare, scale.idle_readers)))
    return make_row(
        name="idle",
        what=f"resident memory per idle reader at {scale.idle_readers:,}, over {CONTEXTS} contexts",
        unit="KiB/reader",
        limit_is="a bare ASGI stream with as many readers",
        goal=Goal(on="value", at_most=20),
        rounds=rounds,
    )


def kib_per_reader(server: Running, readers: int) -> float:
    """What the resident memory of a server that has had a few readers grows by."""
    with Child("holding", Options(url=server.url, streams=WARM_STREAMS, contexts=CONTEXTS)) as few:
        few.read()
        few.release()
        few.wait()
    before = psutil.Process(server.child.pid).memory_info().rss
    with Child("holding", Options(url=server.url, streams=readers, contexts=CONTEXTS)) as many:
        many.read()
        after = psutil.Process(server.child.pid).memory_info().rss
        many.release()
        many.wait()
    return float((after - before) / 1024 / readers)
