"""Tool calls in the database, and what must be so of them at any moment, in one statement each (§5, §8)."""

import json
from dataclasses import dataclass
from typing import Any

from evidence import Evidence
from witness import Witness

ENDED = ("denied", "succeeded", "failed", "timed_out", "cancelled")


@dataclass(frozen=True)
class StoredCall:
    """A call's row, with the message that asked for it and the one that is its result."""

    key: int
    id: str
    turn_id: str
    round: int
    name: str
    arguments: dict[str, Any] | None
    status: str
    requires_approval: bool
    external: bool
    collected: bool
    error: str | None
    created_at: int
    decided_at: int | None
    started_at: int | None
    message_id: str
    result_message_id: str | None


async def stored_calls(truth: Witness, context_key: int) -> list[StoredCall]:
    """Of a context, in the order in which they were asked for."""
    rows = await truth.rows(
        """SELECT t.key, t.id, t.turn_id, t.round, t.name, t.arguments, t.status,
                  t.requires_approval, t.external, t.collected, t.error, t.created_at,
                  t.decided_at, t.started_at, a.id, r.id
           FROM tool_calls t JOIN messages a ON a.key = t.message_key
           LEFT JOIN messages r ON r.key = t.result_message_key
           WHERE t.context_key = $1 ORDER BY t.key""",
        context_key,
    )
    return [StoredCall(*row[:5], _json(row[5]), *row[6:]) for row in rows]


async def check_calls_whole(truth: Witness, evidence: Evidence) -> None:
    """Calls, turns and states fit together."""
    for what, sql in WHOLE.items():
        ((count,),) = await truth.rows(sql)
        if count:
            evidence.fault(what, rows=count)


async def calls_by_status(truth: Witness) -> dict[str, int]:
    """How many calls of running turns there are of each status that is not an end."""
    rows = await truth.rows(
        """SELECT t.status || CASE WHEN t.external THEN ', external' ELSE '' END, count(*)
           FROM tool_calls t JOIN contexts c ON c.key = t.context_key
           WHERE t.status IN ('pending', 'approved', 'running') GROUP BY 1"""
    )
    return {row[0]: row[1] for row in rows}


def _json(text: Any) -> Any:
    return json.loads(text) if isinstance(text, str) else text


_CALLS = """SELECT count(*) FROM tool_calls t JOIN contexts c ON c.key = t.context_key
            JOIN turns u ON u.context_key = c.key AND u.id = t.turn_id WHERE """
_HAS = """EXISTS (SELECT 1 FROM tool_calls t JOIN turns u
          ON u.context_key = t.context_key AND u.id = t.turn_id AND u.status = 'running'
          WHERE t.context_key = c.key AND """
WHOLE = {
    "a context that waits for a decision of nothing": f"""
        SELECT count(*) FROM contexts c WHERE c.state = 'awaiting_tool_approval'
        AND NOT {_HAS} t.status = 'pending')""",
    "an undecided call in another state": f"""{_CALLS} t.status = 'pending'
        AND c.state NOT IN ('processing_llm_response', 'awaiting_tool_approval')""",
    "a context that waits for a result of nothing": f"""
        SELECT count(*) FROM contexts c WHERE c.state = 'awaiting_tool_results'
        AND NOT {_HAS} t.status = 'approved' AND t.external)""",
    "a context that waits for results and has calls to run": f"""
        SELECT count(*) FROM contexts c WHERE c.state = 'awaiting_tool_results'
        AND {_HAS} (t.status IN ('pending', 'running')
                    OR (t.status = 'approved' AND NOT t.external)))""",
    "a running call in another state": f"""
        {_CALLS} t.status = 'running' AND c.state <> 'executing_tools'""",
    "an approved call in another state": f"""{_CALLS} t.status = 'approved' AND c.state NOT IN
        ('processing_llm_response', 'awaiting_tool_approval', 'executing_tools',
         'awaiting_tool_results')""",
    "a call that outlives its turn": f"""
        {_CALLS} t.status IN ('pending', 'approved', 'running') AND u.status <> 'running'""",
    "a call that has ended without a result": f"""{_CALLS} t.result_message_key IS NULL
        AND t.status IN ('denied', 'succeeded', 'failed', 'timed_out')""",
    "a call that has a result and has not ended": f"""{_CALLS} t.result_message_key IS NOT NULL
        AND t.status NOT IN ('denied', 'succeeded', 'failed', 'timed_out')""",
    "a call that was collected before its end": f"""
        {_CALLS} t.collected AND t.status IN ('pending', 'approved', 'running')""",
    "an external call that was run": f"""{_CALLS} t.external
        AND (t.started_at IS NOT NULL OR t.status IN ('running', 'timed_out'))""",
    "a denied call that nobody decided": f"""
        {_CALLS} t.status = 'denied' AND t.decided_at IS NULL""",
    "an undecided call with the time of its decision": f"""
        {_CALLS} t.status = 'pending' AND t.decided_at IS NOT NULL""",
    "a result that is none": f"""{_CALLS} t.result_message_key IS NOT NULL AND NOT EXISTS
        (SELECT 1 FROM messages m WHERE m.key = t.result_message_key AND m.role = 'tool'
         AND m.kind = 'tool_result' AND m.status = 'completed' AND m.turn_id = t.turn_id
         AND NOT m.superseded)""",
    "one result of two calls": """
        SELECT count(*) FROM (SELECT result_message_key FROM tool_calls
        WHERE result_message_key IS NOT NULL GROUP BY result_message_key
        HAVING count(*) > 1) AS f""",
    "a result of no call": """
        SELECT count(*) FROM messages m JOIN contexts c ON c.key = m.context_key
        WHERE m.kind = 'tool_result' AND NOT EXISTS
        (SELECT 1 FROM tool_calls t WHERE t.result_message_key = m.key)""",
    "a turn that waits for people and has an owner": """
        SELECT count(*) FROM turns u JOIN contexts c ON c.key = u.context_key
        WHERE u.status = 'running' AND u.owner_id IS NOT NULL
        AND c.state IN ('awaiting_tool_approval', 'awaiting_tool_results')""",
    "a turn at work without an owner": """
        SELECT count(*) FROM turns u JOIN contexts c ON c.key = u.context_key
        WHERE u.status = 'running' AND u.owner_id IS NULL
        AND c.state NOT IN ('awaiting_tool_approval', 'awaiting_tool_results')""",
}
