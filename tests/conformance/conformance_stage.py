"""Plays scenarios for the suite: `conformance_stage.py SOCKET`.

Each run is a process of its own, and a resumed one two. They are forked from here, so that the import of the MCP SDK,
which takes longer than a scenario, is paid once.
"""

import json
import os
import signal
import socket
import sys
import traceback

from conformance_plays import (
    Assignment,
    play_after_a_handshake,
    play_first_half,
    play_fresh,
    play_second_half,
)


def resumed(assignment: Assignment) -> None:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        play_first_half(assignment, lambda *left: os.write(writing, json.dumps(left).encode()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        left = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the first half ended with {status}"
    play_second_half(assignment, *json.loads(left))


WAYS = {"fresh": play_fresh, "resumed": resumed, "handshake-first": play_after_a_handshake}


def perform(connection: socket.socket) -> int:
    """Play what the connection asks for, in a process that is ours, and return the exit status."""
    with connection.makefile() as lines:
        asked = json.loads(lines.readline())
    os.dup2(connection.fileno(), 1)
    os.dup2(connection.fileno(), 2)
    try:
        WAYS[asked.pop("way")](Assignment(**asked))
    except Exception:  # noqa: BLE001 - it is said, and is the status
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            status = perform(connection)
            connection.sendall(f"\n{status}".encode())
            os._exit(status)
        connection.close()


if __name__ == "__main__":
    main()
