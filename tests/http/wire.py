"""What the tests at the wire share: a client without knowledge of contextd's code, and an SSE reader.

Nothing here imports contextd: what is asserted comes from the protocol alone.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

DEADLINE_S = 20.0
POLL_S = 0.005
PROBLEM_TYPE = "application/problem+json"
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ENDED = ("completed", "cancelled", "failed")

Json = dict[str, Any]

SIGNAL_FIELDS = {
    "state_changed": {
        "type", "context_id", "new_state", "revision", "record_revision", "timestamp",
    },
    "content_delta": {
        "type", "context_id", "message_id", "current_sequence", "role", "kind", "timestamp",
    },
    "message_completed": {
        "type", "context_id", "message_id", "final_sequence", "role", "kind", "status", "revision",
        "timestamp",
    },
    "heartbeat": {"type", "timestamp"},
}  # fmt: skip


def script(*steps: Json) -> str:
    """A text that the scripted provider plays (§13)."""
    return json.dumps({"script": list(steps)})


# A turn that goes on until somebody ends it.
ENDLESS = script({"text": "on and on "}, {"delay_ms": 600_000})
SILENT = script({"delay_ms": 600_000})


def problem(response: httpx.Response, status: int, code: str) -> Json:
    """The problem that was answered, with its form checked (§1, RFC 9457)."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].split(";")[0] == PROBLEM_TYPE
    body: Json = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert isinstance(body["type"], str)
    assert isinstance(body["title"], str)
    assert isinstance(body["detail"], str)
    return body


def invalid(response: httpx.Response, field: str) -> Json:
    """A 400 that names `field`."""
    body = problem(response, 400, "invalid_request")
    assert body["errors"], body
    for error in body["errors"]:
        assert set(error) == {"field", "message"}, body
        assert isinstance(error["message"], str)
    assert field in [error["field"] for error in body["errors"]], body
    return body


def ok(response: httpx.Response, status: int = 200) -> Json:
    """The JSON of an answer of that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].split(";")[0] == "application/json"
    body: Json = response.json()
    return body


def until(probe: Callable[[], T], what: str = "it") -> T:
    """Asks until the answer is true, with a deadline; returns the answer."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(POLL_S)
    return answer


class Api:
    """The routes by name; each returns what was answered, most of them checked for success."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=DEADLINE_S + 20)

    def close(self) -> None:
        self.http.close()

    def create(self, **body: Any) -> str:
        """A new context's id."""
        answer = ok(self.http.post("/contexts", json=body), 201)
        return str(answer["id"])

    def context(self, context_id: str) -> Json:
        return ok(self.http.get(f"/contexts/{context_id}"))

    def post_message(self, context_id: str, content: str, **more: Any) -> httpx.Response:
        body = {"payload": {"type": "text", "content": content}, **more}
        return self.http.post(f"/contexts/{context_id}/messages", json=body)

    def send(self, context_id: str, content: str, **more: Any) -> Json:
        status = 202 if more.get("respond", True) else 201
        return ok(self.post_message(context_id, content, **more), status)

    def turn(self, context_id: str, turn_id: str) -> Json:
        return ok(self.http.get(f"/contexts/{context_id}/turns/{turn_id}"))

    def ended(self, context_id: str, turn_id: str) -> Json:
        """The turn, once it has ended."""

        def probe() -> Json | None:
            turn = self.turn(context_id, turn_id)
            return turn if turn["status"] in ENDED else None

        return until(probe, f"the end of turn {turn_id}") or {}

    def run(self, context_id: str, content: str, **more: Any) -> tuple[Json, Json]:
        """Sends and waits for the turn's end: the answer and the turn."""
        answer = self.send(context_id, content, **more)
        return answer, self.ended(context_id, answer["turn_id"])

    def in_state(self, context_id: str, *states: str) -> Json:
        """The context, once it is in one of these states."""

        def probe() -> Json | None:
            context = self.context(context_id)
            return context if context["state"] in states else None

        return until(probe, f"state {states}") or {}

    def page(self, context_id: str, **params: Any) -> Json:
        return ok(self.http.get(f"/contexts/{context_id}/messages", params=params))

    def messages(self, context_id: str, **params: Any) -> list[Json]:
        """All messages of the list."""
        return self.walk(f"/contexts/{context_id}/messages", **params)

    def message(self, context_id: str, message_id: str) -> Json:
        return ok(self.http.get(f"/contexts/{context_id}/messages/{message_id}"))

    def replies(self, context_id: str, turn_id: str) -> list[Json]:
        """The turn's messages that the server wrote, in their order."""
        ids = self.turn(context_id, turn_id)["message_ids"]
        found = [self.message(context_id, message_id) for message_id in ids]
        return [message for message in found if message["role"] != "user"]

    def reply(self, context_id: str, content: str) -> Json:
        """Sends, waits, and returns the turn's one message, closed."""
        answer, _ = self.run(context_id, content)
        (message,) = self.replies(context_id, answer["turn_id"])
        return message

    def opened(self, context_id: str) -> Json:
        """The first open message, as the Context names it, once there is one."""
        return until(lambda: self.context(context_id)["open_messages"], "an open message")[0]

    def get_content(
        self, context_id: str, message_id: str, *, headers: Json | None = None, **params: Any
    ) -> httpx.Response:
        return self.http.get(
            f"/contexts/{context_id}/messages/{message_id}/content", params=params, headers=headers
        )

    def pull(self, context_id: str, message_id: str, **params: Any) -> Json:
        return ok(self.get_content(context_id, message_id, **params))

    def text(self, context_id: str, message_id: str) -> str:
        """The whole text of a closed message, as a reader by the rules gets it (§4.4)."""
        held, pieces = 0, []
        while True:
            answer = self.pull(context_id, message_id, from_sequence=held, wait=20)
            assert answer["from_sequence"] == held
            pieces.append(answer["content"])
            held = answer["sequence"]
            if answer["final"]:
                return "".join(pieces)

    def chunks(self, context_id: str, message_id: str, **params: Any) -> Json:
        path = f"/contexts/{context_id}/messages/{message_id}/chunks"
        return ok(self.http.get(path, params=params))

    def texts(self, context_id: str, message_id: str) -> list[str]:
        """A message's chunks, each by itself."""
        page = self.chunks(context_id, message_id, limit=1000)
        return [chunk["content"] for chunk in page["chunks"]]

    def walk(self, path: str, **params: Any) -> list[Json]:
        """All items of a paged list."""
        items: list[Json] = []
        cursor = None
        while True:
            more = {} if cursor is None else {"cursor": cursor}
            page = ok(self.http.get(path, params={**params, **more}))
            assert len(page["items"]) <= params.get("limit", 1000)
            items += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return items

    def journal(self, context_id: str) -> list[Json]:
        return self.walk(f"/contexts/{context_id}/transitions")

    def cancel(self, context_id: str, **body: Any) -> Json:
        return ok(self.http.post(f"/contexts/{context_id}/cancel", json=body))

    @contextmanager
    def stream(
        self,
        context_id: str,
        *,
        headers: Json | None = None,
        silence_s: float = DEADLINE_S,
        **params: Any,
    ) -> Iterator["Stream"]:
        """A stream of signals that is known to have started; no read waits above `silence_s`."""
        path = f"/contexts/{context_id}/stream"
        with self.http.stream(
            "GET", path, params=params, headers=headers, timeout=silence_s
        ) as response:
            assert response.status_code == 200, response.read()
            yield Stream(response)

    def attach(self, context_id: str, **params: Any) -> list["Frame"]:
        """What an attaching reader is told, up to the heartbeat that says: you are current."""
        with self.stream(context_id, **params) as stream:
            return stream.current()


class Frame:
    """One server-sent event: its fields as they came, and the signal in its data."""

    def __init__(self, lines: list[str]) -> None:
        fields = [line.partition(":")[::2] for line in lines]
        self.fields = {name: value.removeprefix(" ") for name, value in fields}
        assert len(self.fields) == len(fields), f"a field came twice: {lines}"
        self.size = sum(len(line.encode()) + 1 for line in lines) + 1
        self.id = self.fields.get("id")
        self.event = self.fields.get("event")
        self.signal: Json = json.loads(self.fields["data"]) if "data" in self.fields else {}
        self.type = str(self.signal.get("type"))

    def __getitem__(self, name: str) -> Any:
        return self.signal[name]

    def get(self, name: str) -> Any:
        return self.signal.get(name)

    def __repr__(self) -> str:
        return f"<{self.id} {self.signal or self.fields}>"

    def check(self) -> None:
        """Of one of the four types, with its fields and no other, and under 1 KB (§4)."""
        assert self.type in SIGNAL_FIELDS, self
        assert set(self.signal) == SIGNAL_FIELDS[self.type], self
        assert TIMESTAMP.fullmatch(self["timestamp"])
        assert self.size < 1024, self


class Stream:
    """Reads frames one after the other; the client's read timeout is the deadline."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = response.headers
        self._frames = self._parse(response.iter_raw())

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def until(self, wanted: Callable[[Frame], bool]) -> list[Frame]:
        """The frames up to the first that is wanted, and with it."""
        seen = []
        for frame in self._frames:
            seen.append(frame)
            if wanted(frame):
                return seen
        raise AssertionError(f"the stream ended before: {seen}")

    def current(self) -> list[Frame]:
        """What comes on attaching, up to the first heartbeat."""
        return self.until(lambda frame: frame.type == "heartbeat")

    def until_state(self, state: str, *, after: int = 0) -> list[Frame]:
        """Up to the `state_changed` to `state` with a revision above `after`."""
        return self.until(lambda f: f.get("new_state") == state and f["revision"] > after)

    def until_completed(self, message_id: str | None = None) -> list[Frame]:
        """Up to a `message_completed`, of the message that is named."""
        return self.until(
            lambda f: f.type == "message_completed" and message_id in (None, f["message_id"])
        )

    def _parse(self, raw: Iterator[bytes]) -> Iterator[Frame]:
        rest = b""
        for piece in raw:
            rest += piece
            while b"\n\n" in rest:
                block, _, rest = rest.partition(b"\n\n")
                frame = Frame(block.decode().split("\n"))
                if frame.signal:
                    frame.check()
                    yield frame
        assert not rest, f"the stream ended within a frame: {rest!r}"
