"""Session IDs, cookies, credentials and header values are in no log record, whatever happens to the session."""

import logging

import anyio
import pytest
from calls import KINDS, echo, slow
from mcp import Client, MCPError

from mcp_celery.exceptions import MCPCeleryError
from mcp_celery.transport import resumable_http

pytestmark = pytest.mark.anyio

SECRETS = {"user": "us3r-s3cret", "header": "h3ader-s3cret", "cookie": "c00kie-s3cret"}


@pytest.fixture
def shown(caplog):
    """`shown()` returns all that was logged at any level by anybody, with arguments, exceptions and all."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx2", "httpcore2", "httpcore2.http11", "httpcore2.connection", "mcp", "mcp_celery", "client"):
        caplog.set_level(logging.DEBUG, logger=name)

    def text():
        formatter = logging.Formatter("%(name)s %(message)s")
        return "\n".join(f"{formatter.format(record)} {record.args!r}" for record in caplog.records)

    return text


def with_secrets(recorder):
    recorder.set_cookie(f"route={SECRETS['cookie']}; Path=/")
    url = recorder.url.replace("http://", f"http://me:{SECRETS['user']}@")
    return f"{url}?key={SECRETS['user']}", {"x-key": SECRETS["header"]}


def assert_none_in(text, *session_ids):
    for secret in (*SECRETS.values(), *session_ids):
        assert secret
        assert secret not in text


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_the_life_of_a_session_logs_no_secret(recorded_peer, shown, peer):
    recorder = recorded_peer(*peer)
    url, headers = with_secrets(recorder)
    async with Client(transport := resumable_http(url, headers=headers, listen=True)) as client:
        session_id = transport.session_id
        await client.call_tool(*echo(peer, "x"))
        with anyio.move_on_after(0.2):
            await client.call_tool(*slow(peer, 100, 0.1))
        handle = transport.handle
    async with Client(again := resumable_http(url, headers=headers, handle=handle), mode="legacy") as client:
        await client.call_tool(*echo(peer, "x"))
        await again.terminate()
    assert_none_in(shown(), session_id)
    assert_none_in(repr((transport, again, handle, client)), session_id)


@pytest.mark.parametrize("peer", KINDS, ids=" ".join)
async def test_what_goes_wrong_logs_and_raises_no_secret(recorded_peer, new_session, shown, peer):
    recorder = recorded_peer(*peer)
    url, headers = with_secrets(recorder)
    session = new_session(url, headers=tuple(headers.items()))
    await session.open()
    session_id = session.session_id
    errors = []

    async def attempt():
        try:
            await session.call_tool(*echo(peer, "x"))
        except (MCPCeleryError, MCPError) as exc:
            while exc is not None:
                errors.append(f"{exc} {exc!r}")
                exc = exc.__cause__ or exc.__context__

    recorder.drop(rpc_method="tools/call")
    await attempt()
    recorder.answer(rpc_method="tools/call", status=500, body=b"oops", content_type="text/plain")
    await attempt()
    recorder.answer(rpc_method="tools/call", status=200, body=b"data: no json\n\n", content_type="text/event-stream")
    await attempt()
    target = f"http://me:{SECRETS['user']}@127.0.0.1:1/?key={SECRETS['user']}"
    recorder.answer(rpc_method="tools/call", status=307, headers={"Location": target})
    await attempt()
    recorder.answer(rpc_method="tools/call", status=404)
    await attempt()
    assert len(errors) >= 5
    assert_none_in("\n".join([*errors, repr(session), shown()]), session_id)


async def test_logs_of_other_requests_of_the_same_process_are_left_alone(recorded_peer, new_session, shown):
    import httpx2

    recorder = recorded_peer("python")
    await new_session(recorder.url).open()
    assert "HTTP Request" not in shown()
    async with httpx2.AsyncClient() as client:
        await client.get(recorder.url)
    assert "HTTP Request: GET" in shown()
