"""The people around a conversation: who decides its calls, and who runs its external tools (§8).

They see what waits by asking for it, are killed connections under like everybody, repeat what was not
answered, and now and then ask for what must be refused.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from holdings import World
from nasty_scripts import NASTY
from raw_http import Answer, BrokenError, Connection, HungError
from tool_conversation import ToolConversation
from tool_ledger import Decision, Posted, Said
from tool_script import edited

PAUSE_S_MAX = 0.4
ANSWER_S_MAX = 6.0
LETTERS_MANY = 70_000  # more than one chunk may have
UNFIT = {"mark": 7}


class Person(ABC):
    """Does one thing after the other. `operating` is called with each operation as it goes out."""

    def __init__(
        self,
        world: World,
        conversation: ToolConversation,
        name: str,
        seed: str,
        operating: Callable[[str], None],
    ) -> None:
        self.conversation = conversation
        self.ledger = conversation.ledger
        self.evidence = world.evidence
        self.random = Random(f"{seed}:{name}")
        self.name = name
        self._world = world
        self._operating = operating
        self._connection: Connection | None = None
        self._open: Said | None = None  # what was asked and not answered

    async def run(self) -> None:
        """Until it is cancelled, or the context is deleted."""
        try:
            while self.conversation.id not in self.evidence.deleting:
                try:
                    await self._go_on()
                except BrokenError:
                    self.evidence.counts["people cut off"] += 1
                except HungError as error:
                    self.evidence.fault("a person who waits for ever", operation=str(error))
                await self._world.up.wait()
                await asyncio.sleep(self.random.uniform(0, PAUSE_S_MAX))
        except Exception as error:
            self.evidence.fault("a person who broke", by=self.name, error=repr(error))
            raise
        finally:
            self._hang_up()

    async def look(self, status: str) -> list[dict[str, Any]]:
        """The calls of this status; what is seen of them must not change."""
        target = f"/contexts/{self.conversation.id}/tool-calls?limit=100"
        if self.random.random() < 0.8:
            target += f"&status={status}"
        answer = await self.ask("GET", target)
        if answer.status != 200:
            self.wrong("a list of calls", answer)
            return []
        items: list[dict[str, Any]] = answer.json()["items"]
        for item in items:
            self.ledger.see(item)
        return [item for item in items if item["status"] == status]

    async def ask(self, method: str, target: str, body: Any = None) -> Answer:
        """One request to any server that is up. Raises `BrokenError`."""
        port = self._world.direct_port()
        if port is None:
            raise BrokenError("no server is up")
        if self._connection is None or self._connection.port != port or self.random.random() < 0.2:
            self._hang_up()
            self._connection = Connection(port)
        encoded = None if body is None else msgspec.json.encode(body)
        return await self._connection.request(method, target, body=encoded)

    def wrong(self, what: str, answer: Answer) -> None:
        """An answer that the contract does not allow, unless the server or the context is going."""
        going = answer.status == 404 and self.conversation.id in self.evidence.deleting
        if answer.status != 503 and not going:
            self.evidence.fault(
                f"a wrong answer to {what}",
                by=self.name,
                context=self.conversation.id,
                status=answer.status,
                body=answer.body[:300],
            )

    async def _go_on(self) -> None:
        if self._open is not None and self.random.random() < 0.8:
            self.evidence.counts["sayings repeated as their answer was lost"] += 1
            await self._say(self._open)
            return
        self._open = None
        await self._look_for_work()

    @abstractmethod
    async def _look_for_work(self) -> None: ...

    @abstractmethod
    async def _say(self, said: Said) -> None: ...

    async def _post(self, operation: str, path: str, body: Any, said: Said) -> Answer:
        """It counts as unanswered until the answer is here."""
        self._open = said
        self._operating(operation)
        answer = await self.ask("POST", f"/contexts/{self.conversation.id}/tool-calls/{path}", body)
        if answer.status != 503:
            self._open = None
        return answer

    def _settle(self, what: str, answer: Answer, said: Said, codes: tuple[str, ...]) -> None:
        if answer.status == 202:
            self.ledger.take(said)
            self.evidence.counts[f"{what} taken"] += 1
        elif answer.status == 409 and answer.code in codes:
            self.ledger.refuse(said, decided=answer.code == "tool_call_decided")
            self.evidence.counts[f"{what} refused"] += 1
        else:
            self.wrong(what, answer)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Decider(Person):
    """Approves, denies and edits what waits."""

    async def _look_for_work(self) -> None:
        if self.random.random() < 0.15 and self.ledger.decisions:
            await self._say_again()
            return
        waiting = await self.look("pending")
        if not waiting:
            return
        chosen = [item for item in waiting if self.random.random() < 0.7] or waiting[:1]
        if self.random.random() < 0.05:
            await self._say_unfit(chosen[0])
            return
        await self._say(self.ledger.ask(tuple(map(self._decide, chosen))))

    def _decide(self, item: dict[str, Any]) -> Decision:
        if self.random.random() < 0.3:
            reason = self.random.choice((None, f"no: {self.random.choice(NASTY)}"))
            return Decision(item["id"], "deny", reason)
        if self.random.random() < 0.3 and item["name"] != "list_directory":
            words = f"edited by {self.name} {self.random.randrange(1_000_000)}"
            changed = edited(self.random, item["name"], item["arguments"], words)
            return Decision(item["id"], "approve", arguments=changed)
        return Decision(item["id"], "approve")

    async def _say_again(self) -> None:
        """What was said before, or the opposite of what was taken."""
        decision, said = self.random.choice(self.ledger.decisions[self._any_decided()])
        if self.random.random() < 0.5:
            await self._say(self.ledger.ask(said.items))
            return
        other = Decision(decision.call_id, "deny" if decision.word == "approve" else "approve")
        await self._say(self.ledger.ask((other,)))

    def _any_decided(self) -> str:
        return self.random.choice([*self.ledger.decisions])

    async def _say(self, said: Said) -> None:
        body = {"decisions": [item.body() for item in said.items if isinstance(item, Decision)]}
        answer = await self._post("decide", "decisions", body, said)
        self._settle("decisions", answer, said, ("tool_call_decided",))

    async def _say_unfit(self, item: dict[str, Any]) -> None:
        """Arguments that the tool does not take: 400, and nothing is decided."""
        if item["name"] == "list_directory":
            return  # takes none of its own that could be wrong
        unfit = Decision(item["id"], "approve", arguments=UNFIT)
        target = f"/contexts/{self.conversation.id}/tool-calls/decisions"
        answer = await self.ask("POST", target, {"decisions": [unfit.body()]})
        self.evidence.counts["unfit arguments given"] += 1
        if answer.status != 400:
            self.wrong("unfit arguments", answer)


class Answerer(Person):
    """Runs external tools, as far as their callers can tell: posts a result for each call.

    Some at once, while other tools still run; some late, when all the others wait for it.
    """

    def __init__(self, *facts: Any) -> None:
        super().__init__(*facts)
        self._due_s: dict[str, float] = {}

    async def _look_for_work(self) -> None:
        if self.random.random() < 0.15 and self.ledger.results:
            await self._post_again()
            return
        approved = await self.look("approved")
        external = [item for item in approved if item["external"] and self._is_due(item["id"])]
        if self.random.random() < 0.04 and self.ledger.seen:
            await self._say(self._result(self.random.choice([*self.ledger.seen])))
        elif external:
            await self._say(self._result(self.random.choice(external)["id"]))

    def _is_due(self, call_id: str) -> bool:
        now_s = time.monotonic()
        takes_s = self.random.choice((0.0, self.random.uniform(0, ANSWER_S_MAX)))
        return now_s >= self._due_s.setdefault(call_id, now_s + takes_s)

    def _result(self, call_id: str) -> Said:
        words = f"{self.name} {self.random.randrange(1_000_000)} {self.random.choice(NASTY)}"
        content = self.random.choices((words, "", words + "x" * LETTERS_MANY), (90, 5, 2))[0]
        return self.ledger.ask((Posted(call_id, content, self.random.random() < 0.2),))

    async def _post_again(self) -> None:
        """The same result once more, perhaps long after its turn, or another one."""
        call_id = self.random.choice([*self.ledger.results])
        posted, _ = self.random.choice(self.ledger.results[call_id])
        again = self.random.random() < 0.5
        await self._say(self.ledger.ask((posted,)) if again else self._result(call_id))

    async def _say(self, said: Said) -> None:
        (posted,) = said.items
        assert isinstance(posted, Posted)
        body: dict[str, Any] = {"content": posted.content}
        if posted.is_error or self.random.random() < 0.5:
            body["is_error"] = posted.is_error
        answer = await self._post("result", f"{posted.call_id}/result", body, said)
        self._settle("results", answer, said, ("tool_call_decided", "illegal_transition"))
