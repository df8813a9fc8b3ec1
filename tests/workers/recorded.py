"""What holds for each session of each workflow, read off the requests that a recorder has seen."""

from collections import Counter

from processes import wait_until

CALL = "POST tools/call"


def exchanges_of(recorder, session_id):
    """The requests in one session, in order, without the one that opened it."""
    return [exchange for exchange in recorder.exchanges if exchange.session_id == session_id]


def sessions_of(recorder):
    """The IDs of all sessions that were opened or used, in order."""
    used = [exchange.session_id for exchange in recorder.exchanges if exchange.session_id is not None]
    return list(dict.fromkeys([*recorder.session_ids, *used]))


def calls_of(recorder, session_id):
    """How many tools were called in one session."""
    return sum(exchange.name == CALL for exchange in exchanges_of(recorder, session_id))


def texts_of(exchanges):
    """What was given as `text` to the tools that were called, in order."""
    arguments = [exchange.rpc_params["arguments"] for exchange in exchanges if exchange.name == CALL]
    return [each["text"] for each in arguments if "text" in each]


def session_named(recorder, name):
    """The ID of the session in which a variable of this name was set, once there is one."""
    return recorder.wait_for(
        lambda exchange: exchange.name == CALL and exchange.rpc_params["arguments"].get("name") == name
    ).session_id


def assert_well_kept(recorder, session_id, *, closed=True):
    """A session was opened once at most, and ended by one DELETE, which no request follows."""
    opened = Counter(
        (exchange.response_headers or {}).get("mcp-session-id")
        for exchange in recorder.exchanges
        if exchange.rpc_method == "initialize"
    )
    assert opened[session_id] <= 1
    exchanges = exchanges_of(recorder, session_id)
    names = [exchange.name for exchange in exchanges]
    assert names.count("DELETE") == closed, names
    assert names.count("POST notifications/initialized") == opened[session_id], names
    assert names.count("GET") == 0, names
    assert not closed or names[-1] == "DELETE", names


def assert_sessions(project, calls):
    """All sessions since the beginning of the test are well kept, and had so many *calls* each, in any order.

    Waits until they have ended and no worker has anything to do.
    """
    counts = [calls] if isinstance(calls, int) else sorted(calls)
    recorder = project.recorder
    project.sessions_closed(len(counts))
    project.rest()
    ids = sessions_of(recorder)
    assert len(recorder.session_ids) <= len(ids) == len(counts), recorder.methods()
    for session_id in ids:
        assert_well_kept(recorder, session_id)
    assert sorted(calls_of(recorder, session_id) for session_id in ids) == counts, recorder.methods()
    wait_until(lambda: not project.stored(), what="an empty store")
