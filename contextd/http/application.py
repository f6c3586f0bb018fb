"""The whole HTTP side, put together: the gate, the three bare routes, and Litestar with the rest."""

from collections.abc import Sequence
from functools import cache

import msgspec
from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide

from contextd.http import (
    branches,
    contexts,
    health,
    messages,
    openapi,
    producing,
    tools,
    turns,
    workflows,
)
from contextd.http.append import AppendChunks
from contextd.http.bare import BareRoutes
from contextd.http.body import BodyLimits
from contextd.http.content import PullContent
from contextd.http.gate import Gate
from contextd.http.problems import EXCEPTION_HANDLERS
from contextd.http.query import check_request
from contextd.http.stream import StreamSignals
from contextd.service import Service
from contextd.settings import Settings
from contextd.store.reader import Reader

HANDLERS = (
    *contexts.HANDLERS,
    *messages.HANDLERS,
    *producing.HANDLERS,
    *tools.HANDLERS,
    *turns.HANDLERS,
    *workflows.HANDLERS,
    *branches.HANDLERS,
    *health.HANDLERS,
)


def make_application(
    settings: Settings,
    service: Service,
    figures: health.TurnFigures,
    reader: Reader,
    providers: Sequence[str],
) -> Gate:
    """The ASGI application of one server."""
    rooms = {
        "contexts": service.contexts,
        "messages": service.messages,
        "content": service.content,
        "records": service.records,
        "steps": service.steps,
        "retries": service.retries,
        "producers": service.producers,
        "branches": service.branches,
        "calls": service.calls,
        "workflows": service.workflows,
    }
    dependencies = {name: _given(room) for name, room in rooms.items()}

    @cache  # made when it is first asked for: that takes longer than all the rest of the start
    def document() -> bytes:
        return msgspec.json.encode(openapi.make_document(HANDLERS, dependencies, providers))

    litestar = Litestar(
        route_handlers=[*HANDLERS, openapi.get_document],
        dependencies=dependencies,
        exception_handlers=EXCEPTION_HANDLERS,
        guards=[check_request],
        openapi_config=None,
        request_max_body_size=settings.request_bytes_max,
        state=State(
            {
                "service": service,
                "reader": reader,
                "openapi_document": document,
                "registry": health.make_registry(service, figures),
                "request_bytes_max": settings.request_bytes_max,
                "long_body": BodyLimits.of(settings, long_text=True),
                "short_body": BodyLimits.of(settings, long_text=False),
            }
        ),
        # Litestar's own logging would write what it was given: requests hold chat text.
        logging_config=None,
        debug=False,
    )
    bare = BareRoutes(
        litestar,
        content=PullContent(service.content),
        stream=StreamSignals(service.streams, settings),
        append=AppendChunks(service.producers, settings),
        methods=openapi.methods_of(HANDLERS),
    )
    return Gate(
        bare,
        allowed_hosts=(settings.host, *settings.allowed_hosts),
        cors_origins=settings.cors_origins,
    )


def _given(room: object) -> Provide:
    return Provide(lambda: room, sync_to_thread=False, use_cache=True)
