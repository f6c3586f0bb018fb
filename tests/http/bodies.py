"""Bodies and fields that several files of these tests share, as the protocol has them (§2, §3, §5)."""

from wire import Json, script

CONTEXT_FIELDS = {
    "id", "title", "state", "state_detail", "revision", "record_revision", "stream_cursor", "mode",
    "active_branch", "system_prompt", "provider", "model", "tools", "approval_policy", "on_busy",
    "metadata", "message_count", "open_messages", "pending_tool_calls", "queued_messages",
    "can_send", "created_at", "updated_at",
}  # fmt: skip

EXTERNAL_TOOL = {
    "name": "weather",
    "description": "The weather somewhere",
    "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    "external": True,
}

EVERYTHING: Json = {
    "title": "Ünïcode 🦊",
    "mode": "plan",
    "system_prompt": "Be brief.",
    "provider": "scripted",
    "model": "some-model",
    "tools": ["read_file", EXTERNAL_TOOL],
    "approval_policy": {"mode": "manual", "allow": ["read_file"], "max_depth": 3, "max_calls": 7},
    "on_busy": "reject",
    "metadata": {"a": {"b": [1, 2.5, None, True, "x"]}},
}

MESSAGE_FIELDS = {
    "id", "context_id", "turn_id", "parent_id", "role", "kind", "status", "current_sequence",
    "final_sequence", "media_type", "finish_reason", "usage", "error", "metadata",
    "client_metadata", "stats", "created_at", "completed_at",
}  # fmt: skip
SEND_FIELDS = {
    "context_id", "message_id", "turn_id", "state", "revision", "stream_cursor", "queued",
}  # fmt: skip

# The chunks of the message that the fixture `closed` writes.
CHUNKS = ["The ", "quick ", "brown 🦊", "\n", "\n\n", "jumps", " ü", "ber", "…"]

# A turn of about a sixth of a second.
SLOWLY = script({"rate": 60}, {"text": "one two three four five six seven eight nine ten "})
