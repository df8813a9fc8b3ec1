"""The settings of servers, store, reaper and journal: read through Celery, checked before anything is sent."""

import ssl
import traceback

import pytest
from celery import Celery

from mcp_celery import MCPTask
from mcp_celery.exceptions import ConfigurationError
from mcp_celery.redis_store import get_store
from mcp_celery.settings import (
    JournalSettings,
    ReaperSettings,
    StoreSettings,
    journal_settings,
    reaper_settings,
    server_name,
    server_settings,
    store_settings,
)

SECRET = "t0p-s3cret"  # noqa: S105 - looked for in what is shown
URL = "http://127.0.0.1:8000/mcp"
#: What is no number of seconds, nor 0.
NO_SECONDS = [-1, float("inf"), float("nan"), "5", None, True]


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
    assert settings.keepalive_seconds == 300.0
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
        "keepalive_seconds": 0.5,
        "ca_file": "ca.pem",
        "listen": True,
    }
    settings = server_settings(conf(browser=options), "browser")
    assert settings.headers == (("Authorization", f"Bearer {SECRET}"),)
    assert (settings.connect_timeout_seconds, settings.read_timeout_seconds) == (1.0, 2.5)
    assert settings.keepalive_seconds == 0.5
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


@pytest.mark.parametrize("value", [0, *NO_SECONDS])
@pytest.mark.parametrize("option", ["connect_timeout_seconds", "read_timeout_seconds"])
def test_a_timeout_is_a_positive_number(conf, option, value):
    assert option in refusal(conf(browser={"url": URL, option: value}), "browser")


@pytest.mark.parametrize("value", [False, *NO_SECONDS])
def test_a_time_for_keeping_alive_is_a_positive_number(conf, value):
    assert "keepalive_seconds" in refusal(conf(browser={"url": URL, "keepalive_seconds": value}), "browser")


def test_a_time_for_keeping_alive_may_be_0_for_never(conf):
    assert server_settings(conf(browser={"url": URL, "keepalive_seconds": 0}), "browser").keepalive_seconds == 0


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


# The store


def conf_of(**settings):
    """The configuration of an app whose broker and result backend are no Redis, unless *settings* say so."""
    app = Celery("app", set_as_current=False)
    app.conf.update({"broker_url": "amqp://", "result_backend": "rpc://", **settings})
    return app.conf


def store_refusal(conf):
    """The text of the ConfigurationError, which holds no secret."""
    with pytest.raises(ConfigurationError) as caught:
        store_settings(conf)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        (f"redis://user:{SECRET}@h", f"redis://user:{SECRET}@h"),
        (
            "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/A",
            "rediss://h/0?ssl_cert_reqs=required&ssl_ca_certs=/A",
        ),
        ("rediss://h/0?ssl_cert_reqs=none", "rediss://h/0?ssl_cert_reqs=none"),
        ("redis+socket:///run/redis.sock?virtual_host=5", "unix:///run/redis.sock?db=5"),
        ("unix:///run/redis.sock?db=5", "unix:///run/redis.sock?db=5"),
        ("valkey://h", "redis://h"),
        ("redis://a:1;redis://b:1", "redis://a:1"),
        ("sentinel://a:1/0;sentinel://b:2", "sentinel://a:1/0;sentinel://b:2"),
    ],
)
def test_the_store_is_written_as_celery_writes_redis(written, read):
    for settings in ({"mcp_store_url": written}, {"result_backend": written}, {"broker_url": written}):
        assert store_settings(conf_of(**settings)).url == read


@pytest.mark.parametrize(
    ("backend", "broker", "read"),
    [
        ("redis://results/1", "redis://broker/0", "redis://results/1"),
        ("rpc://", "redis://broker/0", "redis://broker/0"),
        ("rpc://", ["redis://one/0", "redis://other/0"], "redis://one/0"),
        ("rpc://", ["sentinel://one/0", "sentinel://other/0"], "sentinel://one/0;sentinel://other/0"),
        ("rpc://", "amqp://", None),
        ("rpc://", "filesystem://", None),
        ("db+sqlite:///results.db", ["amqp://one", "amqp://other"], None),
        ("file:///results", None, None),
    ],
)
def test_the_store_is_the_result_backend_or_else_the_broker(backend, broker, read):
    settings = store_settings(conf_of(broker_url=broker, result_backend=backend))
    assert (settings and settings.url) == read


def test_the_store_is_found_where_celery_reads_the_environment(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://broker/0")
    assert store_settings(Celery("app", set_as_current=False).conf).url == "redis://broker/0"
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://results/0")
    assert store_settings(Celery("app", set_as_current=False).conf).url == "redis://results/0"


def test_a_named_store_comes_before_all_others_and_an_empty_name_means_none():
    redis = {"broker_url": "redis://broker/0", "result_backend": "redis://results/0"}
    assert store_settings(conf_of(**redis, mcp_store_url="redis://named/0")).url == "redis://named/0"
    assert store_settings(conf_of(**redis, mcp_store_url="")) is None
    assert get_store(conf_of(**redis, mcp_store_url="")) is None


def test_a_store_is_one_object_for_equal_settings():
    named = {"mcp_store_url": "redis://h/0", "mcp_store_options": {"password": SECRET}}
    assert get_store(conf_of(**named)) is get_store(conf_of(**named))
    assert get_store(conf_of(**named)) is not get_store(conf_of(**{**named, "mcp_store_options": {"password": "x"}}))
    assert get_store(conf_of(**named)) is not get_store(conf_of(**named, mcp_store_prefix="other"))


TLS = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "ca.pem"}
SENTINEL = {"master_name": "themaster", "sentinel_kwargs": {"password": SECRET}}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"broker_url": "rediss://h", "broker_use_ssl": TLS}, {"ssl": True, **TLS}),
        ({"broker_url": "redis://h", "broker_use_ssl": TLS}, {"ssl": True, **TLS}),
        ({"result_backend": "rediss://h", "redis_backend_use_ssl": TLS}, {"ssl": True, **TLS}),
        ({"result_backend": "redis://h", "broker_use_ssl": TLS}, {}),
        ({"result_backend": "redis+socket:///s", "redis_backend_use_ssl": TLS}, {}),
        ({"broker_url": "rediss://h"}, {"ssl_cert_reqs": "none"}),
        ({"broker_url": "rediss://h?ssl_ca_certs=A"}, {}),
        ({"broker_url": "sentinel://h", "broker_transport_options": {**SENTINEL, "priority_steps": [0]}}, SENTINEL),
        ({"result_backend": "sentinel://h", "result_backend_transport_options": SENTINEL}, SENTINEL),
        ({"result_backend": "sentinel://h", "broker_transport_options": SENTINEL}, {}),
        ({"broker_url": "redis://h", "broker_transport_options": SENTINEL}, {}),
        ({"mcp_store_url": "rediss://h", "broker_use_ssl": TLS}, {}),
        ({"mcp_store_url": "rediss://h", "mcp_store_options": {"ssl_ca_certs": "A"}}, {"ssl_ca_certs": "A"}),
        ({"broker_url": "redis://h", "mcp_store_options": {"ssl_ca_certs": "A"}}, {}),
    ],
    ids=repr,
)
def test_the_options_of_a_store_are_those_that_stand_beside_its_url(settings, options):
    assert store_settings(conf_of(**settings)).options == options


def test_the_settings_of_a_store_have_defaults():
    assert store_settings(conf_of(mcp_store_url="redis://h")) == StoreSettings(
        url="redis://h", options={}, prefix="mcp_celery", session_ttl_seconds=24 * 3600, history_seconds=3600
    )


def test_every_setting_of_a_store_is_taken_from_a_namespace_too():
    app = Celery(set_as_current=False)
    settings = {
        "CELERY_MCP_STORE_URL": "redis://h",
        "CELERY_MCP_STORE_OPTIONS": {"db": 3},
        "CELERY_MCP_STORE_PREFIX": "team:app-1.mcp",
        "CELERY_MCP_SESSION_TTL_SECONDS": 60,
        "CELERY_MCP_HISTORY_SECONDS": 0,
        "CELERY_MCP_REAPER": False,
        "CELERY_MCP_REAPER_INTERVAL_SECONDS": 0.5,
    }
    app.config_from_object(settings, namespace="CELERY")
    assert store_settings(app.conf) == StoreSettings(
        url="redis://h", options={"db": 3}, prefix="team:app-1.mcp", session_ttl_seconds=60, history_seconds=0
    )
    assert reaper_settings(app.conf) == ReaperSettings(enabled=False, interval_seconds=0.5)


def test_the_settings_of_a_store_show_neither_url_nor_options():
    settings = store_settings(conf_of(mcp_store_url=f"redis://:{SECRET}@h", mcp_store_options={"password": SECRET}))
    assert "mcp_celery" in repr(settings)
    assert SECRET not in repr(settings) + str(settings) + repr(get_store(conf_of(mcp_store_url=f"redis://:{SECRET}@h")))


@pytest.mark.parametrize("url", [f"http://u:{SECRET}@h", f"memcached://{SECRET}", SECRET, 7, {"url": SECRET}], ids=str)
def test_a_store_that_is_no_redis_is_a_mistake(url):
    assert "mcp_store_url starts with" in store_refusal(conf_of(mcp_store_url=url))


@pytest.mark.parametrize("options", [SECRET, [SECRET], 7], ids=repr)
def test_options_of_a_store_are_a_mapping(options):
    conf = conf_of(mcp_store_url="redis://h", mcp_store_options=options)
    assert "mcp_store_options is a mapping" in store_refusal(conf)


@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a*", "a\n", None, 7], ids=repr)
def test_a_prefix_is_a_text_that_may_stand_in_keys(prefix):
    assert "mcp_store_prefix" in store_refusal(conf_of(mcp_store_url="redis://h", mcp_store_prefix=prefix))


@pytest.mark.parametrize("value", [0, *NO_SECONDS])
def test_the_life_of_a_session_is_a_positive_number(value):
    assert "mcp_session_ttl_seconds" in store_refusal(conf_of(mcp_session_ttl_seconds=value))


@pytest.mark.parametrize("value", [False, *NO_SECONDS])
def test_the_time_of_a_history_is_0_or_a_positive_number(value):
    assert "mcp_history_seconds" in store_refusal(conf_of(mcp_history_seconds=value))


# The reaper


def test_the_reaper_works_unless_told_otherwise():
    assert reaper_settings(conf_of()) == ReaperSettings(enabled=True, interval_seconds=5)


@pytest.mark.parametrize("value", [0, *NO_SECONDS])
def test_the_interval_of_the_reaper_is_a_positive_number(value):
    with pytest.raises(ConfigurationError, match="mcp_reaper_interval_seconds"):
        reaper_settings(conf_of(mcp_reaper_interval_seconds=value))


# The journal


def test_a_task_keeps_no_journal_unless_told_to():
    assert journal_settings(conf_of(), None, None) is None


def test_a_durable_task_keeps_its_journal_over_retries_and_does_not_call_again():
    settings = JournalSettings(keeps_over_retries=True, calls_again=False, max_result_bytes=8 * 1024 * 1024)
    assert journal_settings(conf_of(mcp_durable=True), None, None) == settings
    assert journal_settings(conf_of(), True, None) == settings


def test_a_journal_may_be_for_redeliveries_only():
    assert not journal_settings(conf_of(mcp_durable="redelivery"), None, None).keeps_over_retries


def test_a_call_that_may_have_run_may_be_made_again():
    assert journal_settings(conf_of(mcp_on_interrupted="call-again"), True, None).calls_again
    assert journal_settings(conf_of(), True, "call-again").calls_again


def test_the_options_of_a_task_come_before_the_settings():
    conf = conf_of(mcp_durable=True, mcp_on_interrupted="call-again")
    assert journal_settings(conf, False, None) is None
    assert not journal_settings(conf, "redelivery", None).keeps_over_retries
    assert not journal_settings(conf, None, "raise").calls_again


def test_every_setting_of_a_journal_is_taken_from_a_namespace_too():
    app = Celery(set_as_current=False)
    settings = {
        "CELERY_MCP_DURABLE": "redelivery",
        "CELERY_MCP_ON_INTERRUPTED": "call-again",
        "CELERY_MCP_JOURNAL_MAX_RESULT_BYTES": 1000,
    }
    app.config_from_object(settings, namespace="CELERY")
    assert journal_settings(app.conf, None, None) == JournalSettings(
        keeps_over_retries=False, calls_again=True, max_result_bytes=1000
    )


@pytest.mark.parametrize("value", ["yes", "retries", 0, 1, [], None], ids=repr)
def test_durable_is_one_of_three(value):
    with pytest.raises(ConfigurationError, match="mcp_durable is True, False or 'redelivery'"):
        journal_settings(conf_of(mcp_durable=value), None, None)


@pytest.mark.parametrize("value", ["call", True, None], ids=repr)
def test_an_interrupted_call_is_an_error_or_made_again(value):
    for conf in (conf_of(mcp_on_interrupted=value), conf_of(mcp_on_interrupted=value, mcp_durable=True)):
        with pytest.raises(ConfigurationError, match="mcp_on_interrupted is 'raise' or 'call-again'"):
            journal_settings(conf, None, None)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None, True], ids=repr)
def test_the_largest_result_is_a_number_of_bytes(value):
    with pytest.raises(ConfigurationError, match="mcp_journal_max_result_bytes"):
        journal_settings(conf_of(mcp_journal_max_result_bytes=value), True, None)


@pytest.mark.parametrize("options", [{"mcp_server": ("a", "b")}, {"mcp_servers": "a"}])
def test_one_server_and_several_are_not_taken_for_each_other(options):
    with pytest.raises(ConfigurationError, match="several go into mcp_servers"):
        type("OfPeers", (MCPTask,), options)
