"""HTTP for one MCP endpoint: requests on a shared client, with what belongs to one session kept apart.

Many sessions of a process use one `httpx2.AsyncClient`, so cookies, the place a redirect led to, and the count of
requests live here and not on the client. Errors of httpx2 become `TransportError` here, once.
"""

import logging
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import httpx2

from .exceptions import ConfigurationError, TransportError

#: Servers commonly drop an idle connection after 5 s (uvicorn and Node do). Let go of it first: a request that meets
#: the server's closing is lost, and may not be sent again by itself.
KEEPALIVE_EXPIRY_SECONDS = 4.0

#: As many connections as calls at once are asked for; httpx2 would hold back the 101st.
LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=KEEPALIVE_EXPIRY_SECONDS)

MAX_REDIRECTS = 5

#: Loggers that print request URLs and response headers, where `Mcp-Session-Id` and query tokens stand.
_WIRE_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))

_ours: ContextVar[bool] = ContextVar("mcp_celery_request", default=False)


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Drop what the HTTP client would log about our requests; other users of it are left alone."""
    return record.levelno >= logging.WARNING or not _ours.get()


for _name in _WIRE_LOGGERS:
    logging.getLogger(_name).addFilter(_is_not_ours)


def new_client(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    auth: tuple[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    connect_timeout_seconds: float = 5.0,
    read_timeout_seconds: float = 300.0,
) -> httpx2.AsyncClient:
    """Return a client for the sessions of one server. It keeps no cookies of its own.

    Args:
        url: The endpoint; a plain http one needs no certificates, and loading them takes 35 ms.
        headers: Sent with each request, credentials among them.
        auth: User name and password for HTTP Basic.
        ssl_context: For https; by default one with the usual certificate authorities.
        connect_timeout_seconds: For a connection, TLS included.
        read_timeout_seconds: For silence on an open response, so also for a tool that reports nothing.
    """
    if ssl_context is None:
        is_https = httpx2.URL(url).scheme == "https"
        ssl_context = httpx2.create_ssl_context() if is_https else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        client = httpx2.AsyncClient(
            headers=dict(headers or {}),
            auth=auth,
            verify=ssl_context,
            timeout=httpx2.Timeout(read_timeout_seconds, connect=connect_timeout_seconds),
            limits=LIMITS,
        )
    except UnicodeEncodeError:
        # Not the error itself, which holds the header.
        raise ConfigurationError("Header names and values of an MCP server are ASCII") from None
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


class Endpoint:
    """One MCP endpoint as one session sees it.

    Attributes:
        name: What error texts call the server. Never holds credentials.
        cookies: Name to value, as the server has set them.
        requests_sent: How many HTTP requests went out.
    """

    def __init__(
        self, url: str, client: httpx2.AsyncClient, *, name: str, cookies: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.cookies = dict(cookies or {})
        self.requests_sent = 0
        self._url = httpx2.URL(url)
        self._client = client

    @property
    def read_timeout_seconds(self) -> float | None:
        """How long an open response may be silent."""
        return self._client.timeout.read

    @asynccontextmanager
    async def stream(
        self, method: str, *, headers: Mapping[str, str], json: Any = None, is_patient: bool = False
    ) -> AsyncGenerator[httpx2.Response]:
        """Send a request and yield the response, its body unread. Silence is no error where this *is_patient*.

        A redirect is followed where it stays at the same origin and keeps the method, and remembered: everything on
        a request was meant for this endpoint.

        Raises:
            TransportError: The server could not be reached, or broke off; also when that shows in the body of the
                `async with`.
        """
        response = None
        try:
            response = await self._send(method, headers, json, is_patient=is_patient)
            yield response
        except httpx2.HTTPError as exc:
            # The cause of an illegal header shows the header.
            raise self._translate(exc) from (None if isinstance(exc, httpx2.LocalProtocolError) else exc)
        finally:
            if response is not None:
                await response.aclose()

    async def _send(self, method: str, headers: Mapping[str, str], json: Any, *, is_patient: bool) -> httpx2.Response:
        timeout = httpx2.Timeout(self._client.timeout)
        if is_patient:
            timeout.read = None
        for _ in range(MAX_REDIRECTS):
            try:
                request = self._client.build_request(
                    method, self._url, headers=dict(headers), json=json, timeout=timeout
                )
            except ValueError as exc:  # half of a surrogate pair in a text, for instance
                # Without the cause, which holds the text.
                why = f"was not asked: the request cannot be written ({type(exc).__name__})"
                raise TransportError(f"Server {self.name!r} {why}", self.name, None, False) from None
            if self.cookies:
                configured = request.headers.get("cookie")
                ours = [f"{name}={value}" for name, value in self.cookies.items()]
                request.headers["cookie"] = "; ".join([configured, *ours] if configured else ours)
            self.requests_sent += 1
            token = _ours.set(True)
            try:
                response = await self._client.send(request, stream=True, follow_redirects=False)
            finally:
                _ours.reset(token)
            self._take_cookies(response)
            target = response.next_request
            if target is None:
                return response
            await response.aclose()
            if target.method != method or _origin(target.url) != _origin(self._url):
                raise TransportError(
                    f"Server {self.name!r} redirects to {shown(target.url)}, which is another origin or changes the "
                    "method: configure that URL if it is the right one",
                    self.name,
                    response.status_code,
                    False,
                )
            self._url = target.url
        raise TransportError(f"Server {self.name!r} redirects without end", self.name, None, False)

    def _take_cookies(self, response: httpx2.Response) -> None:
        if "set-cookie" in response.headers:
            cookies = httpx2.Cookies()
            cookies.extract_cookies(response)
            for header in response.headers.get_list("set-cookie"):
                self.cookies.pop(header.partition("=")[0].strip(), None)  # it may be a deletion
            self.cookies.update({cookie.name: cookie.value for cookie in cookies.jar if cookie.value is not None})

    def _translate(self, exc: httpx2.HTTPError) -> TransportError:
        kind = type(exc).__name__
        match exc:
            case httpx2.ConnectError() | httpx2.ConnectTimeout():
                why = f"could not be reached ({kind}: {exc})" if str(exc) else f"could not be reached ({kind})"
                sent = False
            case httpx2.ReadTimeout():
                why, sent = f"was silent for {self.read_timeout_seconds:g} s (read_timeout_seconds)", True
            case httpx2.PoolTimeout() | httpx2.LocalProtocolError() | httpx2.UnsupportedProtocol():
                # Not the text: for an illegal header it would show the header.
                why, sent = f"was not asked: the request could not be sent ({kind})", False
            case _:
                why, sent = f"broke off ({kind})", True
        return TransportError(f"Server {self.name!r} {why}", self.name, None, sent)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """Return *url* without user name and password, and those, for HTTP Basic.

    Raises:
        ConfigurationError: *url* is not an http or https URL with a host.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigurationError("The URL of an MCP server starts with http:// or https:// and names a host")
    auth = (parsed.username, parsed.password) if parsed.userinfo else None
    return str(parsed.copy_with(userinfo=b"")), auth


def shown(url: str | httpx2.URL) -> str:
    """Return *url* without user name, password, query and fragment, where secrets stand."""
    return str(httpx2.URL(url).copy_with(userinfo=b"", query=None, fragment=None))
