"""A conversation whose turns call tools, and what its driver does to it besides (§2, §8)."""

from dataclasses import dataclass, field
from typing import Any

from conversation import Ask, Conversation
from nasty_scripts import Script
from tool_ledger import Ledger
from tool_script import AskedCall, ToolScript, declarations, server_tools, tool_script

ALLOWED = (["guarded"], ["guarded", "ask_first", "quick"])
CALL_STATES = ("awaiting_tool_approval", "executing_tools", "awaiting_tool_results")
POLICY = {"mode": "auto", "allow": [], "max_depth": 5, "max_calls": 20}


@dataclass
class ToolConversation(Conversation):
    """`book`: the file that its tools write into. `policies`: all values that were ever asked for."""

    book: str = ""
    _retries_unanswered: int = 0
    ledger: Ledger = field(init=False)
    modes: set[str] = field(default_factory=lambda: {"act"})
    policies: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [value] for name, value in POLICY.items()}
    )

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.evidence)
        self.declared = {"tools": [*server_tools(), *declarations()]}

    @property
    def retries_max(self) -> int:
        """As many turns may have tried another one again."""
        return len(self.retried_turns) + self._retries_unanswered

    def script_of(self, message_id: str) -> ToolScript:
        """What this user's message asks for."""
        script = self.sent[message_id].script
        assert isinstance(script, ToolScript)
        return script

    def asked(self, message_id: str, number: int) -> AskedCall:
        """The call of that number in a message's script, from 1."""
        calls = [call for round_ in self.script_of(message_id).rounds for call in round_.calls]
        return calls[number - 1]

    def new_script(self, message_id: str) -> Script:
        return tool_script(self.random, message_id, self.book)

    async def act(self, ask: Ask) -> None:
        match self.random.choices(("other", "mode", "policy", "look"), (74, 5, 6, 15))[0]:
            case "mode":
                await self._set_mode(ask)
            case "policy":
                await self._set_policy(ask)
            case "look":
                await self._look_at_context(ask)
            case _:
                await super().act(ask)

    async def _retry(self, ask: Ask) -> None:
        self._retries_unanswered += 1
        await super()._retry(ask)
        self._retries_unanswered -= 1

    async def _set_mode(self, ask: Ask) -> None:
        self.operation = "patch"
        mode = self.random.choice(("plan", "act", "act"))
        self.modes.add(mode)
        answer = await ask("PATCH", f"/contexts/{self.id}", {"mode": mode})
        if answer.status != 200 or answer.json()["mode"] != mode:
            self.wrong("patch", answer)
        self.evidence.counts[f"patches to mode {mode}"] += 1

    async def _set_policy(self, ask: Ask) -> None:
        self.operation = "patch"
        name, values = self.random.choice(
            (
                ("mode", ("manual", "auto")),
                ("allow", ALLOWED),
                ("max_calls", (3, 6, 20)),
                ("max_depth", (1, 2, 5)),
            )
        )
        value = self.random.choice(values)
        self.policies[name].append(value)
        answer = await ask("PATCH", f"/contexts/{self.id}", {"approval_policy": {name: value}})
        if answer.status != 200 or answer.json()["approval_policy"][name] != value:
            self.wrong("patch", answer)
        self.evidence.counts["patches of the policy"] += 1

    async def _look_at_context(self, ask: Ask) -> None:
        """One snapshot: who waits for a person says so in its state. Turns with calls are cancelled more."""
        self.operation = "look"
        answer = await ask("GET", f"/contexts/{self.id}", None)
        if answer.status != 200:
            self.wrong("a look", answer)
            return
        shown = answer.json()
        state, pending = shown["state"], shown["pending_tool_calls"]
        fits = bool(pending) == (state == "awaiting_tool_approval")
        if not fits and not (pending and state == "processing_llm_response"):
            self.evidence.fault("calls that wait in another state", context=self.id, shown=shown)
        if state in CALL_STATES and self.random.random() < 0.4:
            await self._cancel(ask)
