"""The client that the suite starts: `conformance_command.py SOCKET WAY URL`.

Has the stage at SOCKET play, and ends as the play did. It imports next to nothing, for it is started for each scenario.
"""

import json
import os
import socket
import sys

SOCKET, WAY, URL = sys.argv[1:]
scenario = os.environ["MCP_CONFORMANCE_SCENARIO"]
if scenario.startswith("sep-2640-"):
    sys.exit()  # an extension for hosts that load skills
asked = {
    "scenario": scenario,
    "version": os.environ["MCP_CONFORMANCE_PROTOCOL_VERSION"],
    "url": URL,
    "context": json.loads(os.environ.get("MCP_CONFORMANCE_CONTEXT", "{}")),
    "way": WAY,
}
with socket.socket(socket.AF_UNIX) as stage:
    stage.connect(SOCKET)
    stage.sendall(json.dumps(asked).encode() + b"\n")
    with stage.makefile() as answer:
        said, _, status = answer.read().rpartition("\n")
sys.stderr.write(said)
sys.exit(int(status or 1))
