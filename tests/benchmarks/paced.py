"""`contextd serve` as it is, but for its provider: one that writes the time, at the rate asked for."""

import sys
from collections.abc import AsyncGenerator

import msgspec

from benchmarks.pacing import Pace, beats, stamp
from contextd import app
from contextd.provider import Event, Finished, ModelRequest, Provider, TextDelta
from contextd.settings import Settings, load


class Paced:
    """Answers a text that is a `Pace` in JSON with that many stamps."""

    name = "scripted"

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Event, None]:
        """One chunk a beat."""
        pace = msgspec.json.decode(request.history[-1].content, type=Pace)
        async for _ in beats(pace):
            yield TextDelta(stamp())
        yield Finished("stop")

    async def aclose(self) -> None:
        """Holds nothing."""


def make_providers(settings: Settings) -> dict[str, Provider]:
    """Only this one, under the name of the default."""
    del settings
    return {Paced.name: Paced()}


if __name__ == "__main__":
    app.make_providers = make_providers
    sys.exit(app.run(load()))
