"""The official conformance suite for clients, with one on our transport: fresh, and resumed by a second process."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conformance_plays import FRESH
from peers.servers import install, missing
from processes import ChildProcess

_HERE = Path(__file__).parent
_SUITE = "@modelcontextprotocol/conformance"
_OLDEST_NODE = 22
#: What each revision asks of a client, apart from OAuth and from extensions of hosts (`auth/...`, `sep-2640-...`).
SCENARIOS = {
    "2025-11-25": [
        "initialize",
        "tools_call",
        "elicitation-sep1034-client-defaults",
        "sse-retry",
        "json-schema-2020-12-preservation",
    ],
    "2026-07-28": [
        "tools_call",
        "request-metadata",
        "sep-2322-client-request-state",
        "http-standard-headers",
        "http-custom-headers",
        "http-invalid-tool-headers",
        "json-schema-ref-no-deref",
        "json-schema-2020-12-preservation",
    ],
}


RUNS = [
    (revision, scenario, way)
    for revision, scenarios in SCENARIOS.items()
    for way in ("fresh", "resumed")
    for scenario in scenarios
]
#: A transport that is not told to prefer 2026-07-28 begins with a handshake, without the headers of that revision.
#: What these scenarios hold against it, by the names of their checks:
AGAINST_HANDSHAKES = {
    "request-metadata": {
        "sep-2575-http-client-sends-version-header",
        "sep-2575-client-populates-meta",
        "sep-2575-client-sends-client-info",
    },
    "http-standard-headers": {"sep-2243-client-includes-standard-headers"},
}
RUNS += [
    ("2026-07-28", scenario, "handshake-first")
    for scenario in SCENARIOS["2026-07-28"]
    if scenario not in AGAINST_HANDSHAKES
]


@dataclass(frozen=True)
class Verdict:
    """What the suite has found in one scenario."""

    passed: list[str]
    failed: list[str]
    said: str


def node() -> str | Path:
    """A Node.js that is new enough: the one installed, else one from npm."""
    installed = shutil.which("node")
    if installed is None or shutil.which("npm") is None:
        missing("Node.js is not installed")
    version = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True).stdout
    is_new = int(version.removeprefix("v").partition(".")[0]) >= _OLDEST_NODE
    install(_HERE, *(["--omit=optional"] if is_new else []))
    return installed if is_new else _HERE / "node_modules" / "node" / "bin" / "node"


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """The socket of a process that plays what the suite's client is asked for."""
    folder = tmp_path_factory.mktemp("stage")
    socket = folder / "socket"
    process = ChildProcess([sys.executable, _HERE / "conformance_stage.py", socket], folder / "log", cwd=_HERE)
    process.wait_until_ready(socket.exists, timeout=30)
    yield socket
    process.kill()


@pytest.fixture(scope="session")
def verdicts(stage, tmp_path_factory):
    """`verdicts(revision, way)` has the suite try a client, once, and returns a `Verdict` for each scenario."""

    @cache
    def verdicts(revision, way):
        folder = tmp_path_factory.mktemp(f"{revision}-{way}")
        program = " ".join(map(str, [sys.executable, "-I", "-S", _HERE / "conformance_command.py", stage, way]))
        client = f'test -n "${{MCP_CONFORMANCE_SCENARIO##auth/*}}" && exec {program}'
        suite = [node(), _HERE / "node_modules" / _SUITE / "dist" / "index.js", "client", "--requirements", revision]
        command = [*suite, "--timeout", "50000", "--command", client, "--output-dir", folder]
        # Its own verdict counts OAuth, which fails.
        run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        found = {re.sub(r"-\d{4}-\d\d-\d\dT[\d-]+Z$", "", path.name): verdict(path) for path in folder.glob("*-*Z")}
        assert found, run.stdout + run.stderr
        return found

    return verdicts


def verdict(folder):
    checks = json.loads((folder / "checks.json").read_text())
    name = lambda check: f"{check['id']}: {check.get('errorMessage') or check['description']}"  # noqa: E731
    return Verdict(
        [check["id"] for check in checks if check["status"] == "SUCCESS"],
        [name(check) for check in checks if check["status"] in {"FAILURE", "WARNING"}],
        (folder / "stderr.txt").read_text(),
    )


@pytest.mark.parametrize(("revision", "scenario", "way"), RUNS)
def test_a_client_on_our_transport_conforms(verdicts, revision, scenario, way):
    found = verdicts(revision, way)[scenario]
    assert found.failed == [], found.said
    assert found.passed
    assert "Traceback" not in found.said, found.said


@pytest.mark.parametrize(("scenario", "checks"), AGAINST_HANDSHAKES.items())
def test_a_handshake_that_comes_first_fails_these_checks_and_no_others(verdicts, scenario, checks):
    found = verdicts("2026-07-28", "handshake-first")[scenario]
    assert {name.partition(":")[0] for name in found.failed} == checks, found.failed


@pytest.mark.parametrize("revision", SCENARIOS)
def test_no_scenario_is_left_out(verdicts, revision):
    ours = {name for name in verdicts(revision, "fresh") if not name.startswith("sep-2640-")}
    assert ours == set(SCENARIOS[revision])
    assert ours <= set(FRESH)
