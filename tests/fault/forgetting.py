"""A deleted context's text is gone at every server within a second, watched or not (§2)."""

import asyncio

from conversation import Conversation
from holdings import World
from raw_http import BrokenError, Connection

GONE_S = 1.0


async def require_forgotten(world: World, conversation: Conversation) -> None:
    """Asks each server for each message that anybody has read of, once, a second after the answer."""
    if conversation.forgotten:
        return
    conversation.forgotten = True
    await asyncio.sleep(GONE_S)
    for port in world.ports():
        connection = Connection(port)
        try:
            for message_id in list(
                world.evidence.messages.get(conversation.id, {})
            ):  # readers add to it
                await _require_forgotten(world, connection, conversation.id, message_id)
        except BrokenError:
            continue  # it was killed meanwhile
        finally:
            connection.close()


async def _require_forgotten(
    world: World, connection: Connection, context_id: str, message_id: str
) -> None:
    path = f"/contexts/{context_id}/messages/{message_id}/content"
    for target in (path, f"{path}?from_sequence=0&to_sequence=1"):
        answer = await connection.request("GET", target)
        world.evidence.counts["deleted texts asked for"] += 1
        if answer.status not in (404, 503):
            world.evidence.fault(
                "a deleted text that is still served",
                context=context_id,
                message=message_id,
                status=answer.status,
                cached=answer.headers.get("cache-control"),
            )
