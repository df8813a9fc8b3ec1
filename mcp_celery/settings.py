"""`app.conf.mcp_servers` and the other `mcp_*` settings, as frozen values.

Reads, checks, and never sends. A wrong option is refused before anything goes to a server.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from .exceptions import ConfigurationError
from .handle import server_name, without_secrets

#: What MCP hosts call Streamable HTTP in `type` (or `transport`).
_HTTP_TYPES = {"http", "streamable-http", "streamable_http", "streamableHttp"}

#: A token of RFC 9110, section 5.6.2.
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Conf(Protocol):
    """What is used of `app.conf`."""

    #: Celery reads these from the environment as well.
    broker_url: Any
    result_backend: Any

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, with the app's namespace applied."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """One server of `mcp_servers`."""

    #: The name in `mcp_servers`, or the URL without credentials. What handles and error texts call the server.
    name: str
    #: http or https; may hold credentials, so it is never shown.
    url: str = field(repr=False)
    #: Sent with each request.
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    #: For a connection to be made, TLS included.
    connect_timeout_seconds: float = 5.0
    #: A call fails when its response brings nothing for so long: no progress, no answer.
    read_timeout_seconds: float = 300.0
    #: An idle session that a waiting step still holds is pinged after so long; 0 for never.
    keepalive_seconds: float = 300.0
    #: A PEM file of certificate authorities, for https; the usual ones by default.
    ca_file: str | None = None
    #: Open the server's standalone stream while a task runs.
    listen: bool = False

    @property
    def place(self) -> str:
        """A hash of the URL without credentials: what the store tells servers of one name apart by."""
        return hashlib.sha256(without_secrets(self.url).encode()).hexdigest()[:8]


def places(servers: Mapping[str, ServerSettings]) -> dict[str, str]:
    """Return the places of *servers* by name, which say to the store whose sessions are meant."""
    return {name: settings.place for name, settings in servers.items()}


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Where sessions are counted, and for how long. All values are JSON types, except within `options`."""

    #: As redis-py writes it, or `sentinel://host:port/db;sentinel://...`. May hold credentials, so it is never shown.
    url: str = field(repr=False)
    #: Keyword arguments of redis-py (TLS, for instance), and for Sentinel `master_name` and `sentinel_kwargs`.
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    #: What all keys begin with.
    prefix: str = "mcp_celery"
    #: The reaper ends a session that was not used for so long.
    session_ttl_seconds: float = 24 * 3600.0
    #: How long what happened in a session is kept after its end; 0 for not at all.
    history_seconds: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class ReaperSettings:
    """How a worker looks after the sessions in the store."""

    #: Whether this worker may lead, that is, end and ping sessions of all workers.
    enabled: bool = True
    #: How often it looks.
    interval_seconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class JournalSettings:
    """How a durable task keeps its journal."""

    #: A retry does not repeat calls that have finished; where False, only a redelivered message finds the journal.
    keeps_over_retries: bool
    #: A call that may have run, and cannot be continued, is made again.
    calls_again: bool
    #: A larger result, as JSON and compressed, is an error.
    max_result_bytes: int


#: How Celery writes the URLs of Redis, and how redis-py does.
_REDIS_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "redis+socket": "unix",
    "unix": "unix",
    "sentinel": "sentinel",
}

#: RFC 5424, as MCP 2025-11-25 has them.
LOG_LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

_OPTIONS = tuple(option.name for option in fields(ServerSettings) if option.name != "name")


def server_settings(conf: Conf, server: str) -> ServerSettings:
    """Return the settings of *server*, a name in `mcp_servers` or a URL.

    Raises:
        ConfigurationError: There is no such server, it cannot be used over HTTP, or an option is wrong.
    """
    servers = conf.get("mcp_servers") or {}
    if not isinstance(servers, Mapping):
        raise ConfigurationError("mcp_servers is a mapping of names to options, such as {'browser': {'url': ...}}")
    if server in servers:
        return _checked(server, servers[server])
    if "://" in server:
        return _checked(server_name(server), {"url": server})
    known = ", ".join(sorted(map(str, servers))) or "none"
    raise ConfigurationError(f"MCP server {server!r} is not in mcp_servers (configured: {known}) and is not a URL")


def store_settings(conf: Conf) -> StoreSettings | None:
    """Return the settings of the store, or None where there is no Redis or Valkey to keep it.

    `mcp_store_url` names it; an empty text means none. By default it is the result backend's, else the broker's.

    Raises:
        ConfigurationError: `mcp_store_url` is no URL of a Redis, or one of the numbers is wrong.
    """
    lives = StoreSettings(
        url="",
        prefix=_prefix(conf.get("mcp_store_prefix", "mcp_celery")),
        session_ttl_seconds=_number(conf, "mcp_session_ttl_seconds", 24 * 3600.0),
        history_seconds=_number(conf, "mcp_history_seconds", 3600.0, least=0),
    )
    named = conf.get("mcp_store_url")
    if named is not None:
        if not named:
            return None
        url = _redis_url(named)
        if url is None:
            raise ConfigurationError("mcp_store_url starts with redis://, rediss://, redis+socket:// or sentinel://")
        options = conf.get("mcp_store_options") or {}
        if not isinstance(options, Mapping):
            raise ConfigurationError("mcp_store_options is a mapping of names to values, as redis-py takes them")
        return replace(lives, url=url, options=options)
    for written, use_ssl, transport in (
        (conf.result_backend, "redis_backend_use_ssl", "result_backend_transport_options"),
        (conf.broker_url, "broker_use_ssl", "broker_transport_options"),
    ):
        url = _redis_url(written)
        if url is not None:
            options = _redis_options(url, conf.get(use_ssl), conf.get(transport))
            provider = conf.get("redis_backend_credential_provider") if written == conf.result_backend else None
            if provider is not None:
                options["credential_provider"] = provider
            return replace(lives, url=url, options=options)
    return None


def reaper_settings(conf: Conf) -> ReaperSettings:
    """Return how a worker looks after sessions.

    Raises:
        ConfigurationError: A number is wrong.
    """
    return ReaperSettings(
        enabled=bool(conf.get("mcp_reaper", True)),
        interval_seconds=_number(conf, "mcp_reaper_interval_seconds", 5.0),
    )


def journal_settings(conf: Conf, durable: object, on_interrupted: object) -> JournalSettings | None:
    """Return how a task keeps its journal, or None where it keeps none.

    Args:
        conf: `app.conf`, with the settings `mcp_durable` and `mcp_on_interrupted`.
        durable: The option `mcp_durable` of the task; None where it has none.
        on_interrupted: The option `mcp_on_interrupted` of the task; None where it has none.

    Raises:
        ConfigurationError: An option is wrong.
    """
    durable = conf.get("mcp_durable", False) if durable is None else durable
    on_interrupted = conf.get("mcp_on_interrupted", "raise") if on_interrupted is None else on_interrupted
    if not isinstance(durable, bool) and durable != "redelivery":  # 1 and 0 are neither, though they equal them
        raise ConfigurationError(f"mcp_durable is True, False or 'redelivery', not {durable!r}")
    if on_interrupted not in ("raise", "call-again"):
        raise ConfigurationError(f"mcp_on_interrupted is 'raise' or 'call-again', not {on_interrupted!r}")
    most = conf.get("mcp_journal_max_result_bytes", 8 * 1024 * 1024)
    if not isinstance(most, int) or isinstance(most, bool) or most <= 0:
        raise ConfigurationError(f"mcp_journal_max_result_bytes is a number of bytes above 0, not {most!r}")
    if durable is False:
        return None
    return JournalSettings(
        keeps_over_retries=durable is True, calls_again=on_interrupted == "call-again", max_result_bytes=most
    )


def progress_interval_seconds(conf: Conf) -> float | None:
    """Return how often progress may go into the state of a task, or None where it does not at all.

    Raises:
        ConfigurationError: It is neither a number of seconds nor None or False.
    """
    value = conf.get("mcp_progress_interval_seconds", 1.0)
    if value is None or value is False:
        return None
    return _number(conf, "mcp_progress_interval_seconds", 1.0, least=0)


def log_level(conf: Conf, level: object) -> Any:
    """Return the level of logs that servers are asked for, or None where they are not asked.

    Args:
        conf: `app.conf`, with the setting `mcp_log_level`.
        level: The option `mcp_log_level` of the task; None where it has none.

    Raises:
        ConfigurationError: It is no level of MCP.
    """
    level = conf.get("mcp_log_level") if level is None else level
    if level is None:
        return None
    if not isinstance(level, str) or level.lower() not in LOG_LEVELS:
        raise ConfigurationError(f"mcp_log_level is one of {', '.join(LOG_LEVELS)}, not {level!r}")
    return level.lower()


def _redis_url(written: object) -> str | None:
    """Return a URL of Celery as redis-py writes it, or None where it is not of a Redis."""
    if isinstance(written, list | tuple):
        written = ";".join(map(str, written))
    if not isinstance(written, str):
        return None
    scheme, separator, rest = written.partition("://")
    if not separator or scheme not in _REDIS_SCHEMES:
        return None
    if scheme == "sentinel":
        return written
    # Of brokers to fail over to, the first.
    return f"{_REDIS_SCHEMES[scheme]}://{_as_redis_writes(rest.split(';')[0])}"


def _redis_options(url: str, use_ssl: object, transport: object) -> dict[str, Any]:
    """Return what Celery keeps beside the URL of a Redis."""
    options: dict[str, Any] = {}
    if use_ssl and not url.startswith("unix:"):
        options |= {"ssl": True, **(use_ssl if isinstance(use_ssl, Mapping) else {})}
    elif url.startswith("rediss:") and "ssl_" not in url:
        # As kombu reads such a URL of a broker, and warns of it; Celery refuses such a URL of a result backend.
        options["ssl_cert_reqs"] = "none"
    if url.startswith("sentinel:") and isinstance(transport, Mapping):
        options |= {name: transport[name] for name in ("master_name", "sentinel_kwargs") if name in transport}
    return options


def _prefix(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w.:-]+", value):
        raise ConfigurationError("mcp_store_prefix is a text of letters, digits and _ . : -")
    return value


def _number(conf: Conf, name: str, default: float, *, least: float | None = None) -> float:
    value = conf.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value < math.inf
    if not is_number or (value <= 0 if least is None else value < least):
        raise ConfigurationError(f"{name} is a number of seconds {'above 0' if least is None else 'of 0 or more'}")
    return float(value)


def _as_redis_writes(rest: str) -> str:
    """Return what follows the scheme with the options that Celery writes differently than redis-py."""
    place, mark, query = rest.partition("?")
    options = [option.partition("=") for option in query.split("&")] if mark else []
    renamed = [
        (
            "db" if name == "virtual_host" else name,
            value.removeprefix("CERT_").lower() if "cert_reqs" in name else value,
        )
        for name, _, value in options
    ]
    return place + mark + "&".join(f"{name}={value}" for name, value in renamed)


def _checked(name: str, options: object) -> ServerSettings:
    if isinstance(options, str):
        options = {"url": options}
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"MCP server {name!r}: options are a mapping with 'url', or the URL itself")
    kind = options.get("type", options.get("transport"))
    if "command" in options or kind == "stdio":
        raise ConfigurationError(
            f"MCP server {name!r} is a stdio server, which lives and dies with one process: no other worker can "
            "continue its sessions. Run it over Streamable HTTP and give its 'url'"
        )
    if kind is not None and kind not in _HTTP_TYPES:
        raise ConfigurationError(f"MCP server {name!r}: type {kind!r} is not supported; Streamable HTTP ('http') is")
    given = {key: value for key, value in options.items() if key not in {"type", "transport"}}
    unknown = sorted(map(str, given.keys() - set(_OPTIONS)))
    if unknown:
        raise ConfigurationError(
            f"MCP server {name!r} has unknown options: {', '.join(unknown)}. Known are {', '.join(_OPTIONS)}"
        )
    if "url" not in given:
        raise ConfigurationError(f"MCP server {name!r} has no 'url'")
    return ServerSettings(name=name, **{key: _CHECKS[key](name, key, value) for key, value in given.items()})


def _url(name: str, _: str, value: object) -> str:
    try:
        parsed = urlsplit(value if isinstance(value, str) else "")
        is_usable = parsed.scheme in {"http", "https"} and bool(parsed.hostname) and parsed.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        is_usable = False
    if not isinstance(value, str) or not is_usable:
        raise ConfigurationError(f"MCP server {name!r}: 'url' starts with http:// or https:// and names a host")
    return value


def _headers(name: str, key: str, value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise ConfigurationError(f"MCP server {name!r}: {key!r} is a mapping of header names to texts")
    if not all(_HEADER_NAME.fullmatch(header) for header in value):
        raise ConfigurationError(f"MCP server {name!r}: a name in {key!r} cannot be that of an HTTP header")
    if not all(text.isascii() and text.isprintable() for text in value.values()):
        # Not the text: it may be a secret, and so may the error of the HTTP client that it would cause.
        raise ConfigurationError(f"MCP server {name!r}: a value in {key!r} is not plain printable ASCII")
    return tuple(value.items())


def _seconds(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"MCP server {name!r}: {key!r} is a number of seconds above 0")
    return float(value)


def _seconds_or_never(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigurationError(f"MCP server {name!r}: {key!r} is a number of seconds, or 0 for never")
    return float(value)


def _text(name: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"MCP server {name!r}: {key!r} is a text")
    return value


def _flag(name: str, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigurationError(f"MCP server {name!r}: {key!r} is True or False")
    return value


_CHECKS: dict[str, Any] = {
    "url": _url,
    "headers": _headers,
    "connect_timeout_seconds": _seconds,
    "read_timeout_seconds": _seconds,
    "keepalive_seconds": _seconds_or_never,
    "ca_file": _text,
    "listen": _flag,
}
