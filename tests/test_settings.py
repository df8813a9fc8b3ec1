"""The settings of servers: read through Celery's own configuration, checked before anything is sent."""

import traceback

import pytest
from celery import Celery

from mcp_celery.exceptions import ConfigurationError
from mcp_celery.settings import server_name, server_settings, store_url

SECRET = "t0p-s3cret"  # noqa: S105 - looked for in what is shown
URL = "http://127.0.0.1:8000/mcp"


@pytest.fixture
def conf():
    """`conf(browser=...)` returns the configuration of a Celery app with these servers."""

    def make(**servers):
        app = Celery(set_as_current=False)
        app.conf.mcp_servers = servers
        return app.conf

    return make


def refusal(conf, server):
    """The text of the ConfigurationError, once it is sure that nothing around it holds the secret."""
    with pytest.raises(ConfigurationError) as caught:
        server_settings(conf, server)
    assert SECRET not in repr(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_a_server_needs_no_more_than_its_url(conf):
    settings = server_settings(conf(browser={"url": URL}), "browser")
    assert (settings.name, settings.url, settings.headers) == ("browser", URL, ())
    assert (settings.connect_timeout_seconds, settings.read_timeout_seconds) == (5.0, 300.0)
    assert (settings.ca_file, settings.listen) == (None, False)


def test_the_url_itself_may_stand_for_the_options(conf):
    assert server_settings(conf(browser=URL), "browser") == server_settings(conf(browser={"url": URL}), "browser")


def test_every_option_is_taken(conf):
    options = {
        "type": "http",
        "url": URL,
        "headers": {"Authorization": f"Bearer {SECRET}"},
        "connect_timeout_seconds": 1,
        "read_timeout_seconds": 2.5,
        "ca_file": "ca.pem",
        "listen": True,
    }
    settings = server_settings(conf(browser=options), "browser")
    assert settings.headers == (("Authorization", f"Bearer {SECRET}"),)
    assert (settings.connect_timeout_seconds, settings.read_timeout_seconds) == (1.0, 2.5)
    assert (settings.ca_file, settings.listen) == ("ca.pem", True)


@pytest.mark.parametrize("key", ["type", "transport"])
@pytest.mark.parametrize("kind", ["http", "streamable-http", "streamable_http", "streamableHttp"])
def test_streamable_http_has_the_names_that_hosts_give_it(conf, key, kind):
    assert server_settings(conf(browser={key: kind, "url": URL}), "browser").url == URL


def test_namespaced_configuration_works():
    app = Celery(set_as_current=False)
    app.config_from_object({"CELERY_MCP_SERVERS": {"browser": {"url": URL}}}, namespace="CELERY")
    assert server_settings(app.conf, "browser").url == URL


def test_a_configuration_module_works(tmp_path, monkeypatch):
    (tmp_path / "mcp_celery_test_config.py").write_text(f"mcp_servers = {{'browser': {{'url': {URL!r}}}}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    app = Celery(set_as_current=False)
    app.config_from_object("mcp_celery_test_config")
    assert server_settings(app.conf, "browser").url == URL


def test_an_app_without_servers_still_takes_a_url():
    settings = server_settings(Celery(set_as_current=False).conf, URL)
    assert (settings.name, settings.url) == (URL, URL)


def test_a_url_is_named_without_the_parts_where_secrets_stand(conf):
    url = f"https://user:{SECRET}@mcp.example:8443/mcp?key={SECRET}#{SECRET}"
    settings = server_settings(conf(), url)
    assert (settings.name, settings.url) == ("https://mcp.example:8443/mcp", url)
    assert server_name(url) == settings.name
    assert server_name("browser") == "browser"


def test_settings_show_neither_url_nor_headers(conf):
    options = {"url": f"https://user:{SECRET}@mcp.example/", "headers": {"x-key": SECRET}}
    settings = server_settings(conf(browser=options), "browser")
    assert "browser" in repr(settings)
    assert SECRET not in repr(settings) + str(settings)


def test_equal_settings_are_one_key(conf):
    options = {"url": URL, "headers": {"x-key": SECRET}}
    first, second = (server_settings(conf(browser=dict(options)), "browser") for _ in range(2))
    assert {first: 1}[second] == 1


def test_an_unknown_name_lists_the_known_ones(conf):
    text = refusal(conf(browser={"url": f"http://u:{SECRET}@h/"}, notebook={"url": URL}), "brwser")
    assert "brwser" in text
    assert "browser, notebook" in text
    assert "none" in refusal(conf(), "browser")


@pytest.mark.parametrize("options", [{"command": "npx", "args": [SECRET]}, {"type": "stdio"}, {"transport": "stdio"}])
def test_a_stdio_server_is_refused_with_the_reason(conf, options):
    assert "Streamable HTTP" in refusal(conf(browser=options), "browser")


def test_the_old_sse_transport_is_refused(conf):
    assert "'sse' is not supported" in refusal(conf(browser={"type": "sse", "url": URL}), "browser")


@pytest.mark.parametrize(
    "url",
    [
        "",
        None,
        7,
        "127.0.0.1:8000",
        f"ftp://{SECRET}@host/",
        "http://",
        f"http:///mcp?key={SECRET}",
        f"http://user:{SECRET}@",
        f"http://user:{SECRET}@host:port/",
        f"http://user:{SECRET}@[::1",
        f"http://user:{SECRET}@host:0/",
    ],
    ids=str,
)
def test_a_url_that_cannot_be_one_is_refused_and_not_shown(conf, url):
    assert "http:// or https://" in refusal(conf(browser={"url": url}), "browser")


@pytest.mark.parametrize("url", [f"http://user:{SECRET}@[::1", f"ws://user:{SECRET}@host/?k={SECRET}"])
def test_a_url_given_in_place_of_a_name_is_checked_too(conf, url):
    refusal(conf(), url)


@pytest.mark.parametrize(
    "headers",
    [
        SECRET,
        [("x-key", SECRET)],
        {"x-key": 7},
        {7: SECRET},
        {"x-key": f"{SECRET}\r\nx-other: 1"},
        {"x-key": f"{SECRET}-schl\u00fcssel"},
        {"x key": SECRET},
        {"x-key\n": SECRET},
        {"": SECRET},
    ],
    ids=repr,
)
def test_headers_that_cannot_be_sent_are_refused_and_not_shown(conf, headers):
    assert "'headers'" in refusal(conf(browser={"url": URL, "headers": headers}), "browser")


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "5", None, True])
@pytest.mark.parametrize("option", ["connect_timeout_seconds", "read_timeout_seconds"])
def test_a_timeout_is_a_positive_number(conf, option, value):
    assert option in refusal(conf(browser={"url": URL, option: value}), "browser")


@pytest.mark.parametrize(("option", "value"), [("listen", 1), ("listen", "yes"), ("ca_file", 7)])
def test_an_option_of_the_wrong_type_is_refused(conf, option, value):
    assert option in refusal(conf(browser={"url": URL, option: value}), "browser")


def test_an_unknown_option_is_refused_and_the_known_ones_are_named(conf):
    text = refusal(conf(browser={"url": URL, "timeout": 5, "header": {"x": SECRET}}), "browser")
    assert "header, timeout" in text
    assert "read_timeout_seconds" in text


def test_a_server_without_url_is_refused(conf):
    assert "no 'url'" in refusal(conf(browser={"headers": {"x-key": SECRET}}), "browser")


@pytest.mark.parametrize("options", [None, 7, [URL]], ids=repr)
def test_options_that_are_no_mapping_are_refused(conf, options):
    assert "mapping" in refusal(conf(browser=options), "browser")


def test_servers_that_are_no_mapping_are_refused():
    app = Celery(set_as_current=False)
    app.conf.mcp_servers = [f"http://u:{SECRET}@host/"]
    assert "mapping" in refusal(app.conf, "browser")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        (
            "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/A",
            "rediss://h/0?ssl_cert_reqs=required&ssl_ca_certs=/A",
        ),
        ("redis+socket:///run/redis.sock?virtual_host=5", "unix:///run/redis.sock?db=5"),
        ("redis://a:1;redis://b:1", "redis://a:1"),
        ("", None),
    ],
)
def test_the_store_is_written_as_celery_writes_redis(written, read):
    app = Celery("app", broker="amqp://", set_as_current=False)
    app.conf.mcp_store_url = written
    assert store_url(app.conf) == read


@pytest.mark.parametrize(
    ("backend", "broker", "read"),
    [
        ("redis://results/1", "redis://broker/0", "redis://results/1"),
        ("rpc://", "redis://broker/0", "redis://broker/0"),
        ("rpc://", "amqp://", None),
    ],
)
def test_the_store_is_the_result_backend_or_else_the_broker(backend, broker, read):
    assert store_url(Celery("app", broker=broker, backend=backend, set_as_current=False).conf) == read


def test_the_store_is_found_where_celery_reads_the_environment(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://broker/0")
    assert store_url(Celery("app", set_as_current=False).conf) == "redis://broker/0"
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://results/0")
    assert store_url(Celery("app", set_as_current=False).conf) == "redis://results/0"


def test_a_store_that_is_no_redis_is_a_mistake():
    app = Celery("app", broker="memory://", set_as_current=False)
    app.conf.mcp_store_url = "http://somewhere:s3cret@h"
    with pytest.raises(ConfigurationError, match="mcp_store_url starts with") as caught:
        store_url(app.conf)
    assert "s3cret" not in str(caught.value)
