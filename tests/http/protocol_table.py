"""The state machine of §5, written down from the page and not from the code."""

TURN_STATES = (
    "processing_user_message", "awaiting_llm_response", "streaming_llm_response",
    "processing_llm_response", "awaiting_tool_approval", "executing_tools",
    "awaiting_tool_results", "processing_tool_results", "transient_failure",
)  # fmt: skip
STATES = {"idle", *TURN_STATES, "failed", "producing"}

# The table of §5, as the page has it.
TABLE: dict[str, list[tuple[tuple[str, ...], str | None]]] = {
    "receive_message": [(("idle", "failed"), "processing_user_message")],
    "request_llm": [
        (
            ("processing_user_message", "processing_tool_results", "transient_failure"),
            "awaiting_llm_response",
        )
    ],
    "first_chunk": [(("awaiting_llm_response",), "streaming_llm_response")],
    "end_stream": [
        (("awaiting_llm_response", "streaming_llm_response"), "processing_llm_response")
    ],
    "require_approval": [(("processing_llm_response",), "awaiting_tool_approval")],
    "execute_tools": [(("processing_llm_response", "awaiting_tool_approval"), "executing_tools")],
    "await_results": [(("executing_tools",), "awaiting_tool_results")],
    "collect_results": [
        (
            (
                "processing_llm_response", "awaiting_tool_approval", "executing_tools",
                "awaiting_tool_results",
            ),
            "processing_tool_results",
        )
    ],
    "finish": [(("processing_llm_response", "processing_tool_results"), "idle")],
    "fail_transiently": [
        (("awaiting_llm_response", "streaming_llm_response"), "transient_failure")
    ],
    "fail": [(TURN_STATES, "failed")],
    "retry": [(("failed",), "awaiting_llm_response")],
    "cancel": [((*TURN_STATES, "producing"), "idle")],
    "open_message": [(("idle", "failed", "producing"), "producing")],
    "close_message": [(("producing",), "idle")],
    "recover": [
        (("awaiting_llm_response", "streaming_llm_response"), "transient_failure"),
        (
            (
                "processing_user_message", "processing_llm_response", "processing_tool_results",
                "executing_tools", "transient_failure",
            ),
            None,
        ),
    ],
}  # fmt: skip
TRANSITIONS = {
    (trigger, source, target or source)
    for trigger, rows in TABLE.items()
    for sources, target in rows
    for source in sources
}
