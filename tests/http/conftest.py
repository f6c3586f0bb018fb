"""Real servers, one for each variant of the settings, shared by all tests of this folder."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bodies import CHUNKS
from filing import FILE_BYTES, HISTORY_BYTES, write_workflows
from serving import Server
from tooling import Chat, Place, ToolApi, serving_tools
from wire import ENDLESS, Api, script, until

FAST = {"scripted_rate": 0, "backoff_initial_s": 0.01, "backoff_max_s": 0.02}

MakeServer = Callable[..., Server]


@pytest.fixture(scope="session")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeServer]:
    """Starts a server on a database of its own; all are stopped when the tests end."""
    with ExitStack() as stack:

        def make(**settings: object) -> Server:
            database: Path = tmp_path_factory.mktemp("server") / "contextd.db"
            return stack.enter_context(Server(database, settings={**FAST, **settings}))

        yield make


@pytest.fixture(scope="session")
def server(make_server: MakeServer) -> Server:
    """The server that most tests share: as fast as it can, with hardly a wait between attempts."""
    return make_server()


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[Api]:
    """A client of the shared server."""
    client = Api(server.url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def tight(make_server: MakeServer) -> Iterator[Api]:
    """A server with small limits."""
    server = make_server(
        request_bytes_max=4000,
        pull_bytes_max=100,
        queue_max=2,
        streams_max=1,
        waiting_pulls_max=1,
    )
    client = Api(server.url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def patient(make_server: MakeServer) -> Iterator[Api]:
    """A server that writes at the default rate, and waits for minutes before a second attempt."""
    client = Api(make_server(scripted_rate="", backoff_initial_s=300, backoff_max_s=300).url)
    yield client
    client.close()


@pytest.fixture(scope="session")
def named(make_server: MakeServer) -> Iterator[Api]:
    """A server that has a name of its own, and one site that may use it; contexts are of one test."""
    hosts, origins = "chat.example,other.example", "https://chat.example"
    client = Api(make_server(allowed_hosts=hosts, cors_origins=origins).url)
    yield client
    client.close()


@pytest.fixture
def context_id(api: Api) -> str:
    """A new context of the shared server."""
    return api.create()


@pytest.fixture(scope="module")
def closed(api: Api) -> tuple[str, str]:
    """A closed message of known chunks."""
    context_id = api.create()
    return context_id, api.reply(context_id, script({"chunks": CHUNKS}))["id"]


@pytest.fixture
def open_message(api: Api, context_id: str) -> Iterator[tuple[str, str]]:
    """An open message that stands at 3 chunks."""
    api.send(context_id, ENDLESS)
    until(lambda: any(m["current_sequence"] == 3 for m in api.context(context_id)["open_messages"]))
    yield context_id, api.opened(context_id)["message_id"]
    api.http.delete(f"/contexts/{context_id}")


@pytest.fixture(scope="session")
def model() -> Iterator[Chat]:
    """A model behind the Chat Completions API, which several servers know."""
    with Chat().serving() as model:
        yield model


@pytest.fixture
def chat(model: Chat) -> Chat:
    """The model, before it is asked anything."""
    model.requests.clear()
    model.replies.clear()
    return model


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of the server with tools."""
    folder: Path = tmp_path_factory.mktemp("workspace")
    (folder / "a.txt").write_text("alpha\nbeta\n")
    return folder


@pytest.fixture(scope="session")
def tooled(make_server: MakeServer, workspace: Path, model: Chat) -> Iterator[ToolApi]:
    """A server with tools and all the patience there is by default, which also knows the model."""
    with serving_tools(make_server, workspace, **model.settings) as client:
        yield client


@pytest.fixture(scope="session")
def files_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of the server to which files and workflows are sent."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="session")
def workflows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its workflows."""
    folder = tmp_path_factory.mktemp("workflows")
    write_workflows(folder)
    return folder


@pytest.fixture(scope="session")
def filing(
    make_server: MakeServer, files_folder: Path, workflows_folder: Path, model: Chat
) -> Iterator[Api]:
    """A server with a workspace, workflows, small limits, and a model to ask."""
    server = make_server(
        workspace=files_folder,
        workflows=workflows_folder,
        file_bytes_max=FILE_BYTES,
        history_bytes_max=HISTORY_BYTES,
        **model.settings,
    )
    client = Api(server.url)
    yield client
    client.close()


@pytest.fixture
def asking(filing: Api) -> str:
    """A context of that server which asks the model."""
    return filing.create(provider="openai", tools=[])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """At the end its gate opens, so nothing that a test left behind goes on for ever."""
    place = Place(tmp_path)
    yield place
    place.open()
