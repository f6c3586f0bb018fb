"""§9 at the wire, 3,000 forks deep: what is read and written costs as much as without forks."""

import asyncio

import pytest
from forks import write_deep
from serving import Server
from sqlalchemy import text
from wire import Api, ok, problem, until

from contextd.store.engines import make_engines

FORKS = 3000
TABLES = ("messages", "heads", "chunks", "turns", "journal", "branches", "segments")


def rows_left(database_url: str) -> dict[str, int]:
    async def read() -> dict[str, int]:
        engines = make_engines(database_url, readers=1)
        async with engines.reader.connect() as connection:
            left = {
                table: await connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0
                for table in TABLES
            }
        await engines.dispose()
        return left

    return asyncio.run(read())


def test_a_branch_of_thousands_of_forks(database_url: str, environment: dict[str, str]) -> None:
    """Every list, a turn and its history, a fork, merges, deletions: all go as anywhere else (§9)."""
    asyncio.run(write_deep(database_url, environment, FORKS))
    with Server(database_url, settings={"scripted_rate": 0}) as server:
        api = Api(server.url)
        ids = [f"d{number}" for number in range(1, FORKS + 1)]
        last = f"b{FORKS}"
        first = api.page("deep", limit=3)
        assert [item["id"] for item in first["items"]] == ids[:3]
        assert [item["id"] for item in api.messages("deep", limit=1000)] == ids
        assert [m["id"] for m in api.messages("deep", branch="b7", limit=5)] == ids[:7]
        names = [branch["name"] for branch in api.walk("/contexts/deep/branches", limit=200)]
        assert names == [f"b{number}" for number in range(1, FORKS + 1)]

        sent, turn = api.run("deep", "on the deepest")
        assert turn["status"] == "completed"
        answer, again = api.run("deep", "from half-way", parent_id="d1500")
        assert again["status"] == "completed"
        assert again["branch"] == f"branch-{FORKS + 1}"
        forked = [m["id"] for m in api.messages("deep", branch=again["branch"], limit=1000)]
        assert forked[:1501] == [*ids[:1500], answer["message_id"]]

        path = "/contexts/deep/branches"
        merged = ok(api.http.post(f"{path}/{last}/merge", json={"source": again["branch"]}))
        assert len(merged["added"]) == 2
        assert merged["left_out"] == []
        named = {"source": last, "message_ids": ["d1", "d1500", "d2999", sent["message_id"]]}
        merged = ok(api.http.post(f"{path}/{again['branch']}/merge", json=named))
        assert [one["message_id"] for one in merged["left_out"]] == ["d1", "d1500"]
        assert len(merged["added"]) == 2
        whole = {"source": last}
        problem(api.http.post(f"{path}/b1/merge", json=whole), 413, "payload_too_large")

        assert api.http.delete(f"{path}/b1500").status_code == 204
        assert [m["id"] for m in api.messages("deep", branch="b1501", limit=1000)] == ids[:1501]
        made = {"name": "b1500", "from_message_id": "d3"}
        assert ok(api.http.post(path, json=made), 201)["leaf_message_id"] == "d3"
        assert [m["id"] for m in api.messages("deep", branch="b1500")] == ids[:3]
        assert api.http.delete("/contexts/deep").status_code == 204
        until(lambda: not any(rows_left(database_url).values()), "the purge")
        api.close()


@pytest.mark.parametrize("taken", [40])
def test_names_that_were_given_away_do_not_slow_forks(api: Api, taken: int) -> None:
    """A fork looks for a free name in ever larger steps (§9)."""
    context_id = api.create()
    first = api.send(context_id, "a", respond=False)["message_id"]
    for number in range(taken):
        made = {"name": f"branch-{number + taken}", "from_message_id": first}
        ok(api.http.post(f"/contexts/{context_id}/branches", json=made), 201)
    api.send(context_id, "b", respond=False, parent_id=first)
    name = api.context(context_id)["active_branch"]
    assert int(name.removeprefix("branch-")) >= 2 * taken
