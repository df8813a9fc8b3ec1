"""Who resumes a session in another process, on which server, and with how many requests: `python -m bench recipe`.

The recipe is that of openai-agents: read `session_id`, leave, come back with the header `Mcp-Session-Id`.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.processes import ROOT
from bench.recipe_steps import AGENTS, AGENTS_KEPT, OURS, SDK
from bench.report import print_table

# The servers of the tests, and the proxy that counts.
sys.path.append(str(ROOT / "tests"))
from peers.recorder import Recorder
from peers.servers import Peers

SERVERS = {
    "Python SDK 2.3": ("python",),
    "Python SDK 2.3, without 2026-07-28": ("python", "--protocol-version", "2025-11-25"),
    "Python SDK 1.30": ("python1",),
    "TypeScript SDK 1.32": ("typescript",),
    "server-everything": ("everything",),
}
NEED_NODE = {"typescript", "everything"}
CLIENTS = {
    AGENTS: "openai-agents, as documented",
    AGENTS_KEPT: "openai-agents, terminate_on_close=False",
    SDK: "mcp SDK with the header",
    OURS: "mcp_celery.transport",
}
STEP_SECONDS = 60


@dataclass
class Attempt:
    """One client on one server, as the second process had it."""

    server: str
    client: str
    resumes: bool
    requests: int
    why: str


def measure(folder: Path) -> list[dict[str, Any]]:
    return [asdict(attempt) for attempt in attempts(folder)]


def attempts(folder: Path) -> Iterator[Attempt]:
    with_node = shutil.which("node") and shutil.which("npm")
    peers = Peers(folder)
    try:
        for server, (kind, *options) in SERVERS.items():
            if kind in NEED_NODE and not with_node:
                print(f"{server} is left out: Node.js is not installed", file=sys.stderr)
                continue
            with Recorder(peers.start(kind, *options).url) as recorder:
                for client, name in CLIENTS.items():
                    yield attempt(recorder, server, client, name)
    finally:
        peers.stop()


def attempt(recorder: Recorder, server: str, client: str, name: str) -> Attempt:
    recorder.clear()
    left = step("leave", client, recorder.url)
    session_ids = recorder.session_ids
    if left.returncode or left.stdout.strip() == "None":
        return Attempt(server, name, False, 0, last_line(left) if left.returncode else "session_id is None")
    is_ended = "DELETE" in recorder.methods()
    recorder.clear()
    back = step("return", client, recorder.url, left.stdout.strip())
    calls = [exchange for exchange in recorder.exchanges if exchange.rpc_method == "tools/call"]
    resumes = (
        back.returncode == 0
        and back.stdout.strip().endswith("red")
        and [call.session_id for call in calls] == session_ids[-1:]
    )
    why = "" if resumes else "the first process ended the session" if is_ended else refusal(recorder) or last_line(back)
    return Attempt(server, name, resumes, len(recorder.exchanges), why)


def step(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.recipe_steps", name, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STEP_SECONDS, check=False)


def refusal(recorder: Recorder) -> str:
    refused = [
        exchange for exchange in recorder.exchanges if (exchange.status or 0) >= 400 and exchange.method != "GET"
    ]
    return f"{refused[-1].name}: HTTP {refused[-1].status}" if refused else ""


def last_line(process: subprocess.CompletedProcess[str]) -> str:
    return (process.stdout + process.stderr).strip().splitlines()[-1][:80]


def print_recipe(rows: list[dict[str, Any]]) -> None:
    for server in dict.fromkeys(row["server"] for row in rows):
        print_table(
            (server, "resumes", "requests", ""),
            [
                (row["client"], "yes" if row["resumes"] else "NO", str(row["requests"]), row["why"])
                for row in rows
                if row["server"] == server
            ],
        )
