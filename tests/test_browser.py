"""The example with a real browser: what one worker typed into a page, another one reads there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peers.servers import install
from processes import ChildProcess, accepts, free_port

_ROOT = Path(__file__).parent.parent
_FOLDER = _ROOT / "examples" / "browser"


@pytest.fixture
def browser(tmp_path):
    """The URL of a Playwright server with the Chromium of this machine."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None or shutil.which("npm") is None:
        pytest.skip("Chromium or Node.js is not installed")
    install(_FOLDER)
    port = free_port()
    env = {"BROWSER_PORT": str(port), "CHROMIUM": chromium}
    server = ChildProcess(["npm", "start"], tmp_path / "browser.log", env=env, cwd=_FOLDER)
    server.wait_until_ready(lambda: accepts(port), timeout=30)
    yield f"http://localhost:{port}/mcp"
    server.kill()


def test_two_workers_share_one_browser(browser, record, valkey, start_worker):
    recorder = record(browser)
    env = {"CELERY_BROKER_URL": valkey, "BROWSER_URL": recorder.url}
    for name in ("a", "b"):
        start_worker("examples.browser.tasks", name, "-Q", name, env=env)
    command = [sys.executable, "-m", "examples.browser.run"]
    run = subprocess.run(
        command, cwd=_ROOT, env=os.environ | env, capture_output=True, text=True, timeout=90, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    opened, *resumed, text = run.stdout.splitlines()
    assert text == "Soup for Ada"
    assert "opened" in opened
    assert all("resumed" in line for line in resumed)
    recorder.wait_for(lambda exchange: exchange.method == "DELETE" and exchange.ended is not None)
    assert len(recorder.session_ids) == 1
    assert recorder.methods().count("POST initialize") == 1
