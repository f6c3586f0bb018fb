"""What holds of the signals of every connection (§4.1, §4.2)."""

from collections import defaultdict

from wire import Frame


def types(frames: list[Frame]) -> list[str]:
    return [frame.type for frame in frames]


def completed(frames: list[Frame]) -> set[str]:
    return {frame["message_id"] for frame in frames if frame.type == "message_completed"}


def check_order(frames: list[Frame]) -> None:
    """What holds for every connection, whatever was merged (§4.1, §4.2)."""
    positions: dict[str, int] = defaultdict(lambda: -1)
    done: set[str] = set()
    revision = 0
    for frame in frames:
        if frame.type == "content_delta":
            assert frame["message_id"] not in done, "a delta after the completion"
            assert frame["current_sequence"] > positions[frame["message_id"]]
            positions[frame["message_id"]] = frame["current_sequence"]
        elif frame.type == "message_completed":
            assert frame["message_id"] not in done, "a second completion"
            assert frame["final_sequence"] >= positions[frame["message_id"]]
            done.add(frame["message_id"])
        elif frame.type == "state_changed":
            assert frame["revision"] > revision, "the state went back"
            assert frame["record_revision"] <= frame["revision"]
            revision = frame["revision"]


def check_live(frames: list[Frame]) -> None:
    """Among live signals: a delta at the final position before each completion (§4.2)."""
    check_order(frames)
    seen: dict[str, int] = {}
    for frame in frames:
        if frame.type == "content_delta":
            seen[frame["message_id"]] = frame["current_sequence"]
        elif frame.type == "message_completed" and frame["final_sequence"]:
            assert seen.get(frame["message_id"]) == frame["final_sequence"], frame
