"""One conversation under fire: what was asked of the server, what it answered, and what must follow.

A send keeps its own `message_id`, so that one whose answer was lost can be sent again (§3.1). Each
operation is noted before it goes out and after it was answered; a crash in between leaves it open
whether it was done, and only then may it be either.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from evidence import Evidence
from nasty_scripts import Script, nasty_script
from raw_http import Answer

Ask = Callable[[str, str, dict[str, Any] | None], Awaitable[Answer]]

NOTE_ROLE = "system"


@dataclass
class Sent:
    """A message as it was sent. `answer` is the first that came; `refused`: a 409, so it is not there."""

    message_id: str
    script: Script
    on_busy: str
    respond: bool
    answer: dict[str, Any] | None = None
    refused: bool = False

    @property
    def role(self) -> str:
        """A note is not answered, and is no user's message, lest the model answer it."""
        return "user" if self.respond else NOTE_ROLE

    def body(self) -> dict[str, Any]:
        """The request."""
        return {
            "message_id": self.message_id,
            "role": self.role,
            "payload": {"type": "text", "content": self.script.content},
            "on_busy": self.on_busy,
            "respond": self.respond,
        }


@dataclass
class Conversation:
    """A context and all that was done to it. `ask` makes one request and raises when it breaks."""

    id: str
    random: Random
    evidence: Evidence
    sends_left: int
    script_s_max: float
    title: str = ""
    declared: dict[str, Any] = field(default_factory=dict)  # what else it is created with
    cursor: str | None = None
    sent: dict[str, Sent] = field(default_factory=dict)
    cancelled_turns: set[str] = field(default_factory=set)
    retried_turns: set[str] = field(default_factory=set)
    titles_asked: list[str] = field(default_factory=list)
    title_answered: str | None = None
    deleted: bool = False
    forgotten: bool = False  # its text was asked for everywhere since, and not found
    operation: str = ""  # what is under way

    @property
    def created(self) -> bool:
        """Whether the creation was answered."""
        return self.cursor is not None

    async def create(self, ask: Ask) -> None:
        """Repeatable: the same id and body answer the context as it is."""
        self.operation = "create"
        body = {"id": self.id, "title": self.title, **self.declared}
        answer = await ask("POST", "/contexts", body)
        if answer.status not in (200, 201):
            self.wrong("create", answer)
            return
        self.cursor = answer.json()["stream_cursor"]

    async def act(self, ask: Ask) -> None:
        """One operation, chosen by chance."""
        open_sends = [s for s in self.sent.values() if s.answer is None and not s.refused]
        if open_sends and self.random.random() < 0.7:
            await self.send(ask, self.random.choice(open_sends))
            return
        choices: dict[str, int] = {
            "send": 40, "interrupt": 8, "reject": 6, "note": 6, "repeat": 6, "cancel": 10,
            "cancel_queued": 6, "patch": 5, "retry": 8, "look": 10,
        }  # fmt: skip
        match self.random.choices([*choices], [*choices.values()])[0]:
            case "send":
                await self.send(ask, self.new_send("enqueue"))
            case "interrupt" | "reject" as on_busy:
                await self.send(ask, self.new_send(on_busy))
            case "note":
                await self.send(ask, self.new_send("enqueue", respond=False))
            case "repeat" if self.sent:
                await self.send(ask, self.random.choice([*self.sent.values()]))
            case "cancel":
                await self._cancel(ask)
            case "cancel_queued":
                await self._cancel_some_turn(ask)
            case "patch":
                await self._patch(ask)
            case "retry":
                await self._retry(ask)
            case _:
                await self._look(ask)

    def new_send(self, on_busy: str, *, respond: bool = True) -> Sent:
        """A message that was never sent before."""
        message_id = f"{self.id}.{len(self.sent) + 1}"
        sent = Sent(message_id, self.new_script(message_id), on_busy, respond)
        self.sent[sent.message_id] = sent
        self.sends_left -= 1
        return sent

    def new_script(self, message_id: str) -> Script:
        """What the message is to ask for."""
        return nasty_script(self.random, seconds_max=self.script_s_max)

    async def send(self, ask: Ask, sent: Sent) -> None:
        """Sends, perhaps again: a repeat answers the same ids and starts nothing."""
        self.operation = "interrupt" if sent.on_busy == "interrupt" else "send"
        answer = await ask("POST", f"/contexts/{self.id}/messages", sent.body())
        if answer.status == 409 and answer.code == "context_busy" and sent.on_busy == "reject":
            if sent.answer is not None:
                self.wrong("a repeat that was refused", answer)
            sent.refused = True
            return
        if answer.status == 429:
            return
        if answer.status != (202 if sent.respond else 201):
            self.wrong("send", answer)
            return
        body = answer.json()
        self.evidence.counts["sends answered"] += 1
        sent.refused = False
        if sent.answer is None:
            sent.answer = body
        names = ("context_id", "message_id", "turn_id")
        if any(body[name] != sent.answer[name] for name in names):
            self.evidence.fault("a repeat that was answered otherwise", was=sent.answer, now=body)

    async def delete(self, ask: Ask) -> None:
        """Repeatable: who deleted it before its answer was lost finds nothing."""
        self.operation = "delete"
        again = self.id in self.evidence.deleting
        self.evidence.deleting.add(self.id)
        answer = await ask("DELETE", f"/contexts/{self.id}", None)
        if answer.status == 204 or (again and answer.status == 404):
            self.deleted = True
        else:
            self.wrong("delete", answer)

    async def require_gone(self, ask: Ask) -> None:
        """A deleted context is gone for good, and its id is never used again (§1)."""
        answer = await ask("GET", f"/contexts/{self.id}", None)
        if answer.status != 404:
            self.wrong("a deleted context that is there", answer)
        answer = await ask("POST", "/contexts", {"id": self.id, "title": self.title})
        if (answer.status, answer.code) != (409, "id_taken"):
            self.wrong("a deleted context's id that is free", answer)

    async def _cancel(self, ask: Ask) -> None:
        self.operation = "cancel"
        answer = await ask("POST", f"/contexts/{self.id}/cancel", {})
        self._note_cancelled(answer)

    async def _cancel_some_turn(self, ask: Ask) -> None:
        turns = [sent.answer["turn_id"] for sent in self.sent.values() if sent.answer]
        turns = [turn_id for turn_id in turns[-4:] if turn_id is not None]
        if not turns:
            return
        self.operation = "cancel"
        turn_id = self.random.choice(turns)
        self._note_cancelled(await ask("POST", f"/contexts/{self.id}/turns/{turn_id}/cancel", None))

    def _note_cancelled(self, answer: Answer) -> None:
        if answer.status != 200:
            self.wrong("cancel", answer)
            return
        turn_id = answer.json()["cancelled_turn_id"]
        if turn_id is not None:
            self.evidence.counts["cancels answered"] += 1
            self.cancelled_turns.add(turn_id)

    async def _patch(self, ask: Ask) -> None:
        self.operation = "patch"
        title = f"title {len(self.titles_asked)}"
        self.titles_asked.append(title)
        self.title_answered = None  # from here on it may be either
        answer = await ask("PATCH", f"/contexts/{self.id}", {"title": title})
        if answer.status == 200 and answer.json()["title"] == title:
            self.title_answered = title
        else:
            self.wrong("patch", answer)

    async def _retry(self, ask: Ask) -> None:
        self.operation = "retry"
        answer = await ask("POST", f"/contexts/{self.id}/retry", None)
        if answer.status == 202:
            self.evidence.counts["retries answered"] += 1
            self.retried_turns.add(answer.json()["turn_id"])
        elif (answer.status, answer.code) != (409, "illegal_transition"):
            self.wrong("retry", answer)

    async def _look(self, ask: Ask) -> None:
        """A list with its text must agree with what every reader was given."""
        self.operation = "look"
        answer = await ask("GET", f"/contexts/{self.id}/messages?include=content&limit=50", None)
        if answer.status != 200:
            self.wrong("list", answer)
            return
        for item in answer.json()["items"]:
            self.evidence.pulled(
                self.id, item["id"], 0, item["content_sequence"], item["content"], "a list"
            )

    def wrong(self, what: str, answer: Answer) -> None:
        """An answer that the contract does not allow."""
        if answer.status == 503:  # the server is stopping: nothing was done, nothing is claimed
            return
        self.evidence.fault(
            f"a wrong answer to {what}",
            context=self.id,
            status=answer.status,
            body=json.loads(answer.body) if answer.body else None,
        )
