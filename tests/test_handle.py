"""A session handle can be written, sent and read again, shows no secret, and notices what happened to it."""

import copy
import json
import pickle
import traceback

import pytest
from kombu.serialization import dumps, loads

from mcp_celery import SessionHandle
from mcp_celery.exceptions import SessionHandleError
from mcp_celery.handle import short_hash, without_secrets

SECRET = "3f2a9c7e-session-of-alice"  # noqa: S105 - looked for in what is shown
NEGOTIATED = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"tools": {"listChanged": True}},
    "serverInfo": {"name": "Brauser\u00e4hnlich", "version": "1.5"},
}
DISCOVERED = {"supportedVersions": ["2026-07-28"], "capabilities": {}}


@pytest.fixture
def handle():
    return SessionHandle("browser", SECRET, NEGOTIATED, {"route": "node-7-secret"})


def error_of(function, *args):
    """The whole text that a log would get of the SessionHandleError that this raises."""
    with pytest.raises(SessionHandleError) as caught:
        function(*args)
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value)


def test_a_handle_survives_its_text_its_json_object_and_itself(handle):
    for form in (handle.dumps(), handle.to_json(), json.loads(handle.dumps()), handle):
        assert SessionHandle.load(form) == handle


def test_every_part_of_a_handle_travels():
    handle = SessionHandle("browser", SECRET, NEGOTIATED, {"route": "7"}, shared=True)
    read = SessionHandle.load(handle.dumps())
    assert (read.server, read.session_id, read.negotiated) == ("browser", SECRET, NEGOTIATED)
    assert (read.cookies, read.shared, read.protocol_version) == ({"route": "7"}, True, "2025-11-25")


def test_a_handle_of_a_server_without_sessions_survives_too():
    handle = SessionHandle.load(SessionHandle("browser", None, DISCOVERED).dumps())
    assert (handle.session_id, handle.short_id, handle.is_stateless_era) == (None, None, True)
    assert handle.protocol_version is None


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_a_handle_crosses_the_serializers_of_celery(handle, serializer):
    content_type, encoding, payload = dumps({"mcp_session": handle}, serializer=serializer)
    read = loads(payload, content_type, encoding, accept=[content_type])["mcp_session"]
    assert SessionHandle.load(read) == handle


def test_a_handle_can_be_copied_pickled_and_used_as_a_key(handle):
    assert copy.deepcopy(handle) == handle == pickle.loads(pickle.dumps(handle))  # noqa: S301 - made here
    assert {handle: "found"}[SessionHandle.load(handle.dumps())] == "found"


def test_a_handle_cannot_be_changed(handle):
    with pytest.raises(AttributeError):
        handle.session_id = "another"


def test_the_text_of_a_handle_is_one_line_of_versioned_json(handle):
    assert "\n" not in handle.dumps()
    assert json.loads(handle.dumps())["v"] == 1


def test_a_handle_shows_its_server_and_a_short_hash_but_no_secret(handle):
    for shown in (repr(handle), str(handle), f"{handle}", repr([handle]), repr({"mcp_session": handle})):
        assert "browser" in shown
        assert short_hash(SECRET) in shown
        assert SECRET not in shown
        assert "node-7-secret" not in shown
    assert handle.short_id == short_hash(SECRET)
    assert len(handle.short_id) == 8


def test_two_sessions_are_two_handles(handle):
    assert handle != SessionHandle("browser", "another", NEGOTIATED, {"route": "node-7-secret"})


@pytest.mark.parametrize(
    "change",
    [
        {"id": "session-of-mallory"},
        {"server": "notebook"},
        {"cookies": {"route": "8"}},
        {"negotiated": {"protocolVersion": "2025-06-18"}},
        {"shared": True},
        {"added": 1},
        {"sum": "00000000"},
        {"sum": None},
    ],
    ids=str,
)
def test_an_altered_handle_is_refused_without_showing_it(handle, change):
    shown = error_of(SessionHandle.load, {**handle.to_json(), **change})
    assert "checksum" in shown
    assert SECRET not in shown
    assert "mallory" not in shown


@pytest.mark.parametrize("part", ["sum", "id", "negotiated", "server", "cookies"])
def test_a_handle_that_lost_a_part_is_refused(handle, part):
    body = handle.to_json()
    del body[part]
    assert SECRET not in error_of(SessionHandle.load, body)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_handle_of_an_unknown_version_says_what_to_do(handle, version):
    shown = error_of(SessionHandle.load, {**handle.to_json(), "v": version})
    assert "same mcp_celery on every worker" in shown
    assert SECRET not in shown


def test_half_of_a_text_is_refused_without_showing_it(handle):
    text = handle.dumps()
    for cut in (text[: len(text) // 2], text[:-1], text[1:], ""):
        shown = error_of(SessionHandle.load, cut)
        assert SECRET not in shown
        assert "node-7-secret" not in shown


@pytest.mark.parametrize("value", [None, 7, b"{}", ["a"], object()], ids=lambda value: type(value).__name__)
def test_what_is_no_handle_at_all_is_refused_by_its_type(value):
    assert type(value).__name__ in error_of(SessionHandle.load, value)


@pytest.mark.parametrize("text", ["1", '"text"', "[]", "null", "{}"])
def test_json_that_is_no_handle_is_refused(text):
    error_of(SessionHandle.load, text)


@pytest.mark.parametrize("wrong", [{"id": 7}, {"server": None}, {"negotiated": "x"}, {"cookies": ["x"]}], ids=str)
def test_a_part_of_the_wrong_type_is_refused_even_with_the_right_checksum(handle, wrong):
    from mcp_celery.handle import _checksum

    body = {key: value for key, value in handle.to_json().items() if key != "sum"} | wrong
    assert "wrong type" in error_of(SessionHandle.load, {**body, "sum": _checksum(body)})


def test_two_servers_that_number_their_sessions_have_sessions_of_different_keys():
    one, other = (SessionHandle(server, "1", {}) for server in ("one", "other"))
    assert one.key != other.key
    assert one.key.startswith(one.short_id)
    assert one.key == SessionHandle("one", "1", {}, shared=True).key


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("note://hello", "note://hello"),
        ("file:///a b/c.txt", "file:///a b/c.txt"),
        ("db://me:t0p@host/table?token=s3cret#part", "db://host/table"),
        ("urn:isbn:1", "urn:isbn:1"),
    ],
)
def test_a_uri_is_shown_without_the_parts_where_secrets_stand(uri, shown):
    assert without_secrets(uri) == shown
