"""Starts the MCP servers of the tests: each a process of its own, on a free port of 127.0.0.1."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import ChildProcess, accepts, free_port

_HERE = Path(__file__).parent
_NODE = _HERE / "node"
_ROOT = _HERE.parent.parent
_MCP1 = "mcp==1.30.0"

#: Every kind that `Peer` knows.
KINDS = ("python", "python1", "everything", "typescript")


def missing(reason: str) -> None:
    """Skip the test because of *reason*, or fail it in CI, where everything can be installed."""
    import pytest  # the benchmark starts the same servers and does without it

    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep the test processes that run side by side from installing the same thing at once."""
    with (_HERE / "servers.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mcp1_python() -> Path:
    """The interpreter that has mcp 1.x, made on first use."""
    if path := os.environ.get("MCP_CELERY_TEST_MCP1_PYTHON"):
        return Path(path)
    folder = _ROOT / ".venv-mcp1"
    python = folder / "bin" / "python"
    requirement = folder / "requirement.txt"
    with _one_at_a_time():
        if not requirement.exists() or requirement.read_text() != _MCP1:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", _MCP1], check=True)
            requirement.write_text(_MCP1)
    return python


def install(folder: Path, *options: str) -> None:
    """Have npm install what the `package.json` in *folder* names, unless it is there."""
    wanted = json.loads((folder / "package.json").read_text())
    packages = wanted["dependencies"] | ({} if options else wanted.get("optionalDependencies", {}))
    with _one_at_a_time():
        for name, version in packages.items():
            installed = folder / "node_modules" / name / "package.json"
            if not installed.exists() or json.loads(installed.read_text())["version"] != version:
                subprocess.run(["npm", "install", "--no-audit", "--no-fund", *options], cwd=folder, check=True)
                break


def _node() -> str:
    """The Node.js executable, with the packages of our servers installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing("Node.js is not installed")
    install(_NODE)
    return node


def _python_command(port: int) -> list[str | Path]:
    return [sys.executable, _HERE / "python_server.py", str(port)]


def _python1_command(port: int) -> list[str | Path]:
    return [_mcp1_python(), _HERE / "python1_server.py", str(port)]


def _everything_command(_port: int) -> list[str | Path]:
    package = _NODE / "node_modules" / "@modelcontextprotocol" / "server-everything"
    preloads = [(_NODE / name).as_uri() for name in ("loopback.mjs", "executions.mjs")]
    imports = [argument for preload in preloads for argument in ("--import", preload)]
    return [_node(), *imports, package / "dist" / "index.js", "streamableHttp"]


def _typescript_command(port: int) -> list[str | Path]:
    return [_node(), _NODE / "server.mjs", str(port)]


_COMMANDS: dict[str, Callable[[int], list[str | Path]]] = {
    "python": _python_command,
    "python1": _python1_command,
    "everything": _everything_command,
    "typescript": _typescript_command,
}


class Peer:
    """A running MCP server; `url` stays the same over a restart, its sessions and counters do not."""

    def __init__(self, kind: str, options: tuple[str, ...], log_path: Path) -> None:
        self.kind = kind
        self.options = options
        self._log_path = log_path
        for attempt in range(3):
            self._port = free_port()
            try:
                self._process = self._start()
            except RuntimeError:  # somebody else took the port meanwhile
                if attempt == 2:
                    raise
            else:
                return

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/mcp"

    @property
    def running(self) -> bool:
        return self._process.running

    def log(self) -> str:
        """All it has printed so far, over all restarts."""
        return self._process.log()

    def stop(self) -> None:
        """End it at once: clients see their connections break."""
        self._process.kill()

    def restart(self) -> None:
        """Start it again on the same port, after ending it if it still runs."""
        self.stop()
        self._process = self._start()

    def _start(self) -> ChildProcess:
        command = [*_COMMANDS[self.kind](self._port), *self.options]
        process = ChildProcess(command, self._log_path, env={"PORT": str(self._port)}, cwd=_HERE)
        process.wait_until_ready(lambda: accepts(self._port), timeout=30)
        return process


class Peers:
    """Starts peers into one folder and ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shared: dict[tuple[str, ...], Peer] = {}
        self._all: list[Peer] = []

    def start(self, kind: str, *options: str) -> Peer:
        """A new process."""
        peer = Peer(kind, options, self._folder / f"{len(self._all)}-{kind}.log")
        self._all.append(peer)
        return peer

    def shared(self, kind: str, *options: str) -> Peer:
        """The one process for these options; started again when somebody stopped it."""
        peer = self._shared.get((kind, *options))
        if peer is None:
            peer = self._shared[kind, *options] = self.start(kind, *options)
        elif not peer.running:
            peer.restart()
        return peer

    def stop(self) -> None:
        for peer in self._all:
            peer.stop()
