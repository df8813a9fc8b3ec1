"""What the sessions of one process share, and what outlives each of them."""

import ssl
from typing import NamedTuple

import httpx2

from .exceptions import ConfigurationError
from .http import new_client, split_credentials
from .listings import ToolListings
from .settings import ServerSettings


class Shared(NamedTuple):
    """What the sessions of one server share in a process."""

    #: Of the endpoint, without credentials, which the client has.
    url: str
    client: httpx2.AsyncClient
    listings: ToolListings


class Connections:
    """What the sessions of one process share: an HTTP client and the tool listings of each server.

    Lives on one event loop. Building a client loads certificates (35 ms), and its connections stay open.
    """

    def __init__(self) -> None:
        self._clients: dict[ServerSettings, Shared] = {}

    def of(self, settings: ServerSettings) -> Shared:
        """Return what the sessions of a server share, made at the first use."""
        if settings not in self._clients:
            url, auth = split_credentials(settings.url)
            client = new_client(
                url,
                headers=dict(settings.headers),
                auth=auth,
                ssl_context=_ssl_context(settings),
                connect_timeout_seconds=settings.connect_timeout_seconds,
                read_timeout_seconds=settings.read_timeout_seconds,
            )
            self._clients[settings] = Shared(url, client, ToolListings())
        return self._clients[settings]

    async def aclose(self) -> None:
        """Close all connections."""
        while self._clients:
            _, shared = self._clients.popitem()
            await shared.client.aclose()


def _ssl_context(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as exc:
        raise ConfigurationError(f"MCP server {settings.name!r}: 'ca_file' cannot be read as PEM ({exc})") from exc
