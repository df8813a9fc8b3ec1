"""`app.conf.mcp_servers` and the other `mcp_*` settings, as frozen values.

Reads, checks, and never sends. A wrong option is refused before anything goes to a server.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol
from urllib.parse import urlsplit

from .exceptions import ConfigurationError
from .handle import server_name

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
    #: A PEM file of certificate authorities, for https; the usual ones by default.
    ca_file: str | None = None
    #: Open the server's standalone stream while a task runs.
    listen: bool = False


#: How Celery writes the URLs of Redis, and how redis-py does.
_REDIS_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "redis+socket": "unix",
    "unix": "unix",
}

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


def store_url(conf: Conf) -> str | None:
    """Return the URL of the Redis or Valkey that counts holders, as redis-py writes it, or None without one.

    `mcp_store_url` names it; an empty text means none. By default it is the result backend's, else the broker's.

    Raises:
        ConfigurationError: `mcp_store_url` is no URL of a Redis.
    """
    named = conf.get("mcp_store_url")
    candidates = [conf.result_backend, conf.broker_url] if named is None else [named]
    for url in candidates:
        # Of brokers to fail over to, the first.
        first = url.split(";")[0] if isinstance(url, str) else ""
        scheme, separator, rest = first.partition("://")
        if separator and scheme in _REDIS_SCHEMES:
            return f"{_REDIS_SCHEMES[scheme]}://{_as_redis_writes(rest)}"
    if named:
        raise ConfigurationError("mcp_store_url starts with redis://, rediss:// or redis+socket://")
    return None


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
    "ca_file": _text,
    "listen": _flag,
}
