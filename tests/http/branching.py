"""Branches at the wire: the requests of §9 by name."""

from typing import Any

import httpx
from wire import Api, Json, ok

BRANCH_FIELDS = {"name", "active", "from_message_id", "leaf_message_id", "created_at"}


def ids(items: list[Json]) -> list[str]:
    return [item["id"] for item in items]


class Tree:
    """The branches of one context; what ends in a Response is unchecked."""

    def __init__(self, api: Api, context_id: str) -> None:
        self.api = api
        self.context_id = context_id
        self.path = f"/contexts/{context_id}/branches"

    def post(self, body: Any) -> httpx.Response:
        return self.api.http.post(self.path, json=body)

    def make(self, name: str, **body: Any) -> Json:
        """A new branch."""
        return ok(self.post({"name": name, **body}), 201)

    def all(self, **params: Any) -> list[Json]:
        return self.api.walk(self.path, **params)

    def names(self) -> list[str]:
        return [branch["name"] for branch in self.all()]

    def find(self, name: str) -> httpx.Response:
        return self.api.http.get(f"{self.path}/{name}")

    def get(self, name: str) -> Json:
        return ok(self.find(name))

    def remove(self, name: str) -> httpx.Response:
        return self.api.http.delete(f"{self.path}/{name}")

    def delete(self, name: str) -> None:
        response = self.remove(name)
        assert (response.status_code, response.content) == (204, b"")

    def switch(self, name: str) -> Json:
        patch = {"active_branch": name}
        return ok(self.api.http.patch(f"/contexts/{self.context_id}", json=patch))

    def ask_merge(self, name: str, body: Any) -> httpx.Response:
        return self.api.http.post(f"{self.path}/{name}/merge", json=body)

    def merge(self, name: str, source: str, **more: Any) -> Json:
        """The answer, with its form checked."""
        answer = ok(self.ask_merge(name, {"source": source, **more}))
        assert set(answer) == {"added", "left_out"}
        assert all(set(entry) == {"message_id", "reason"} for entry in answer["left_out"])
        return answer

    def store(self, text: str, **more: Any) -> str:
        """A message without an answer; its id."""
        return str(self.api.send(self.context_id, text, respond=False, **more)["message_id"])

    def messages(self, branch: str) -> list[Json]:
        return self.api.messages(self.context_id, branch=branch)

    def ids(self, branch: str) -> list[str]:
        return ids(self.messages(branch))

    def line(self, branch: str) -> list[str]:
        """What a branch says, message by message."""
        return [
            message["content"]
            for message in self.api.messages(self.context_id, branch=branch, include="content")
        ]

    def context(self) -> Json:
        return self.api.context(self.context_id)


def reasons(answer: Json) -> Json:
    """Of a merge: why each message was left out."""
    return {entry["message_id"]: entry["reason"] for entry in answer["left_out"]}
