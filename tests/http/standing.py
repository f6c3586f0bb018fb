"""Contexts that stand still in any state, because the database refuses the step that leaves it.

Some states last for a millisecond. Here a SQL trigger on the journal refuses every step out of a state
in which a context is held, other than its ends and its recovery; the server tries again for as long as
it is refused, as it does with a database that another program has locked. The server itself is as it
always is.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving import Server
from tooling import ASK, Place, ToolApi, ask, call, external, start_with_tools
from wire import DEADLINE_S, Json, ok, script, until

# Fast, but for what a test makes it wait for.
SETTINGS: Json = {"scripted_rate": 0, "backoff_initial_s": 0, "backoff_max_s": 0}
SIGN = external("sign", requires_approval=True)
SAID = "let me see "
DONE = {"text": "done"}
# Where nobody has to be held: these wait for somebody outside, or for nothing.
AT_REST = ("awaiting_tool_approval", "awaiting_tool_results", "idle", "failed", "producing")

HOLDS = """
CREATE TABLE held (context_id TEXT, state TEXT, PRIMARY KEY (context_id, state));
CREATE TRIGGER hold BEFORE INSERT ON journal
WHEN NEW.trigger NOT IN ('cancel', 'fail', 'recover') AND EXISTS (
    SELECT 1 FROM held JOIN contexts ON contexts.id = held.context_id
    WHERE contexts.key = NEW.context_key AND held.state = NEW.from_state
)
BEGIN SELECT RAISE(ABORT, 'database is locked'); END;
"""


class Holds:
    """The holds in a server's database, as another program on the same file sets them."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def prepare(self) -> None:
        """Once, when the server has made its tables."""
        with closing(self._connect()) as connection:
            connection.executescript(HOLDS)

    def hold(self, context_id: str, *states: str) -> None:
        """From now on the context stays in these states, and in no other."""
        with closing(self._connect()) as connection, connection:
            connection.execute("DELETE FROM held WHERE context_id = ?", (context_id,))
            rows = [(context_id, state) for state in states]
            connection.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", rows)

    def release_all(self) -> None:
        """Lets every context go on."""
        with closing(self._connect()) as connection, connection:
            connection.execute("DELETE FROM held")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._database, timeout=DEADLINE_S)
        connection.execute("PRAGMA synchronous = OFF")
        return connection


@dataclass(frozen=True, kw_only=True)
class Stand:
    """A context that stands in `state`. `turn_id` is its turn that runs, or the last that ended."""

    stage: "Stage"
    context_id: str
    state: str
    turn_id: str | None
    place: Place

    @property
    def api(self) -> ToolApi:
        """A client of the server as it is now."""
        return self.stage.api

    @property
    def path(self) -> str:
        """Of the context."""
        return f"/contexts/{self.context_id}"

    def context(self) -> Json:
        return self.api.context(self.context_id)

    def journal(self) -> list[Json]:
        return self.api.journal(self.context_id)

    def last_step(self) -> tuple[str, str, str]:
        """Trigger, from and to of the journal's newest entry."""
        entry = self.journal()[-1]
        return entry["trigger"], entry["from_state"], entry["to_state"]

    def calls(self) -> list[Json]:
        """Those of the turn."""
        found = self.api.calls(self.context_id)
        return [one for one in found if one["turn_id"] == self.turn_id]

    def held(self) -> tuple[Json, list[Json], list[Json], list[Json]]:
        """All that a refused request must leave as it is."""
        messages = self.api.messages(self.context_id, include="content")
        return self.context(), self.journal(), self.api.calls(self.context_id), messages

    def go_on(self, *until_states: str) -> None:
        """Lets the context go, up to the first of these states."""
        self.stage.holds.hold(self.context_id, *(s for s in until_states if s not in AT_REST))


class Stage:
    """A server with tools on a database where contexts can be held."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.holds = Holds(folder / "contextd.db")
        self._settings = {**SETTINGS, **settings}
        self._start()
        self.holds.prepare()

    def close(self) -> None:
        """Nothing is left running, and nothing was a defect for the server's log."""
        self.api.close()
        self._server.kill()
        assert "Traceback" not in self._server.log, self._server.log

    def crash(self) -> None:
        """kill -9, and the holds are lifted while the server is down."""
        self.close()
        self.holds.release_all()

    def restart(self) -> None:
        """The next server on the same database."""
        self._start()

    def stand(self, state: str, *before: str, **body: Any) -> Stand:
        """A new context that stands in `state`, after turns of the texts in `before`."""
        context_id = self.api.create(tools=[ASK, SIGN, "echo", "hold"], **body)
        for text in before:
            self.api.run(context_id, text)
        stand = self._brought(context_id, state)
        self.api.in_state(context_id, state)
        if state == "executing_tools":
            stand.place.began()
            until(lambda: stand.calls()[0]["status"] == "succeeded", "the end of the quick tool")
        return stand

    def send(self, text: str, *held: str, **body: Any) -> Stand:
        """A new context that was sent `text` and is held in these states; it stands in the first."""
        context_id = self.api.create(tools=[ASK, SIGN, "echo", "hold"], **body)
        self.holds.hold(context_id, *held)
        turn_id = self.api.send(context_id, text)["turn_id"]
        self.api.in_state(context_id, held[0])
        return self._stand(context_id, held[0], turn_id)

    def _brought(self, context_id: str, state: str) -> Stand:
        if state in BRING:
            return self._stand(context_id, state, BRING[state](self.api, context_id))
        place = self._place(context_id)
        if state not in AT_REST:
            self.holds.hold(context_id, state)
        turn_id = self.api.send(context_id, script(*steps_to(state, place)))["turn_id"]
        return self._stand(context_id, state, turn_id)

    def _stand(self, context_id: str, state: str, turn_id: str | None) -> Stand:
        return Stand(
            stage=self,
            context_id=context_id,
            state=state,
            turn_id=turn_id,
            place=self._place(context_id),
        )

    def _place(self, context_id: str) -> Place:
        folder = self.folder / context_id
        folder.mkdir(exist_ok=True)
        return Place(folder)

    def _start(self) -> None:
        def make(**settings: Any) -> Server:
            return Server(self.folder / "contextd.db", settings=settings).start()

        self._server = start_with_tools(make, **self._settings)
        self.api = ToolApi(self._server.url)


def sign(question: str = "may I?") -> Json:
    """A call of an external tool that needs a person's approval."""
    return ask(question, name="sign")


def steps_to(state: str, place: Place) -> list[Json]:
    """A script whose turn comes by `state`, says something before, and ends well after it."""
    between = {
        "processing_llm_response": [call("echo", text="x"), sign(), ask()],
        "awaiting_tool_approval": [call("echo", text="x"), sign(), ask()],
        "executing_tools": [call("echo", text="x"), ask(), place.holding("hold")],
        "awaiting_tool_results": [call("echo", text="x"), ask()],
        "processing_tool_results": [call("echo", text="x")],
        "transient_failure": [{"error": "transient", "times": 1}],
    }
    return [{"text": SAID}, *between.get(state, []), DONE]


def _idle(api: ToolApi, context_id: str) -> str:
    return str(api.run(context_id, "Hello")[1]["id"])


def _failed(api: ToolApi, context_id: str) -> str:
    steps = script({"text": SAID}, {"error": "fatal"})
    return str(api.run(context_id, steps)[1]["id"])


def _producing(api: ToolApi, context_id: str) -> None:
    path = f"/contexts/{context_id}/messages/produced"
    ok(api.http.put(path, json={"producer": {"id": "worker", "epoch": 1}}), 201)
    chunks = {"epoch": 1, "chunks": [{"sequence": 1, "content": SAID}]}
    ok(api.http.post(f"{path}/chunks", json=chunks))


# How a context is brought into a state that no held turn stands in.
BRING: dict[str, Callable[[ToolApi, str], str | None]] = {
    "idle": _idle,
    "failed": _failed,
    "producing": _producing,
}
