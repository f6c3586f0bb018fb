"""What the tests of references and workflows share: their payloads, and the workflows themselves."""

from pathlib import Path
from typing import Any

import httpx
from wire import Api, Json, ok

FILE_BYTES = 600


HISTORY_BYTES = 2000


REVIEW = """---
title: Review
description: Looks at something.
parameters:
  topic: {type: string, description: what to look at, max_length: 20}
  depth: {type: integer, default: 2, min: 1, max: 5}
  tone: {type: enum, choices: [kind, plain], default: kind}
  twice: {type: boolean, default: false}
  weight: {type: number, required: false}
---
Review {{ topic }} in {{ depth }} steps, {{ tone }}{% if twice %}, twice{% endif %}.
"""


PLAIN = "---\ntitle: {title}\n---\n{title} text\n"


BROKEN = {
    "broken-body": "---\ntitle: x\n---\n{% for %}\n",
    "broken-head": "no front matter\n",
    "broken-name": "---\ntitle: x\n---\n{{ unknown }}\n",
}


def post(api: Api, context_id: str, payload: Json, **more: Any) -> httpx.Response:
    return api.http.post(f"/contexts/{context_id}/messages", json={"payload": payload, **more})


def files(*paths: str, **more: Any) -> Json:
    return {"type": "file_reference", "paths": list(paths), **more}


def workflow(name: str, /, **parameters: Any) -> Json:
    return {"type": "workflow", "workflow": name, "parameters": parameters}


def play(api: Api, context_id: str, payload: Json, **more: Any) -> tuple[Json, Json]:
    """Sends and waits for the turn's end: the answer and the turn."""
    answer = ok(post(api, context_id, payload, **more), 202)
    return answer, api.ended(context_id, answer["turn_id"])


def attached(api: Api, context_id: str) -> list[Json]:
    """The messages that hold what files held, with their text."""
    listed = api.messages(context_id, include="content")
    return [one for one in listed if (one["role"], one["kind"]) == ("tool", "file_reference")]


def sent(request: Json) -> str:
    """All that a model was sent in one request, as one text."""
    return "\n".join(str(message["content"]) for message in request["messages"])


def write_workflows(folder: Path) -> None:
    """The workflows, of which some are broken."""
    (folder / "review.md").write_text(REVIEW)
    (folder / "blank.md").write_text("---\n---\n{% if false %}x{% endif %}\n")
    (folder / "endless.md").write_text(
        "---\n---\n{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}\n"
    )
    for name, text in BROKEN.items():
        (folder / f"{name}.md").write_text(text)
    (folder / ".hidden.md").write_text(PLAIN.format(title="hidden"))
    (folder / "notes.txt").write_text("not one")
