"""The example of docker-compose.yml, as a newcomer runs it. What COMPOSE_FILE adds to that applies here as well."""

import json
import re
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest

ROOT = Path(__file__).parents[2]
STAYING = {"redis", "notebook", "worker-a", "worker-b"}
ROWS = [
    ("load", "a@worker-a", "opened"),
    ("transform", "b@worker-b", "resumed"),
    ("plan", "a@worker-a", "-"),
    ("simulate", "b@worker-b", "resumed"),
    ("report", "a@worker-a", "resumed"),
]


def docker(*arguments, timeout=180):
    """Run a command, and return what it prints.

    Raises:
        RuntimeError: It failed.
    """
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Stack:
    """A compose project of its own name."""

    def __init__(self):
        self.project = f"mcp-celery-test-{uuid4().hex[:8]}"

    def compose(self, *arguments, timeout=180):
        return docker("compose", "--project-name", self.project, "--ansi", "never", *arguments, timeout=timeout)

    def containers(self):
        """What the engine knows of each container of the project, those that have ended included, by service."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found = json.loads(docker("inspect", *ids))
        return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in found}

    def left(self):
        """The IDs of what there is of the project."""
        label = f"label=com.docker.compose.project={self.project}"
        kinds = (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
        return [line for kind in kinds for line in docker(*kind, "--quiet", "--filter", label).split()]


@pytest.fixture(scope="module")
def stack():
    """A project that is not up yet, and is down at the end."""
    try:
        docker("version", timeout=20)
        docker("compose", "version", timeout=20)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"no Docker engine answers, or there is no `docker compose`: {str(exc).strip().splitlines()[-1]}")
    stack = Stack()
    yield stack
    stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans")
    assert not stack.left()


@pytest.fixture(scope="module")
def shown(stack):
    """What `docker compose up` shows of the program that sends the workflow."""
    shown = stack.compose("up", "--build", timeout=600)
    # Some versions send a terminal's "erase this line" to whatever is there.
    lines = [re.sub(r"\x1b\[\d*K", "", line).partition("|") for line in shown.splitlines()]
    return [line.strip() for service, _, line in lines if service.strip() == "run-1"]


def assert_one_session(lines):
    """Check the table of a run and what stands below it."""
    header, *rows = [line.split() for line in lines[: len(ROWS) + 1]]
    assert header == ["task", "worker", "pid", "session", "how", "requests"]
    assert [(task, worker, how) for task, worker, _, _, how, _ in rows] == ROWS
    (session,) = {row[3] for row in rows} - {"-"}
    assert lines[len(ROWS) + 1 :] == [
        "",
        f"Session {session} is closed: one DELETE.",
        "Interest on 1000 at 5% after 10 years: 628.89",
    ]
    return session


def test_docker_compose_up_shows_one_session_on_two_hosts_and_returns(stack, shown):
    assert_one_session(shown)
    assert stack.containers()["run"]["State"]["ExitCode"] == 0


def test_the_other_services_stay_up_and_healthy_without_root(stack, shown):
    containers = stack.containers()
    assert set(containers) == {*STAYING, "run"}
    for service in STAYING:
        assert containers[service]["State"]["Health"]["Status"] == "healthy", service
        assert stack.compose("exec", "-T", service, "id", "-u").strip() != "0", service
    assert containers["run"]["Config"]["User"] == containers["worker-a"]["Config"]["User"] != ""


def test_a_second_run_and_the_sessions_of_both_can_be_looked_at(stack, shown):
    before = stack.containers()
    sessions = {assert_one_session(shown), assert_one_session(stack.compose("run", "--rm", "-T", "run").splitlines())}
    assert all(container["Id"] == before[service]["Id"] for service, container in stack.containers().items())
    listed = stack.compose(
        "exec", "-T", "worker-a", "celery", "-A", "examples.notebook.tasks", "mcp", "sessions", "--ended", "--json"
    )
    assert {session["session"] for session in json.loads(listed)} >= sessions


def test_the_worker_that_the_program_names_is_killed_by_hand_and_the_other_one_finishes_its_call(stack, shown):
    command = ["docker", "compose", "--project-name", stack.project, "run", "--rm", "-T", "survive"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        told = []
        for line in run.stdout:
            told.append(line)
            if found := re.search(r"KILL IT NOW, in another terminal: docker compose (kill worker-[ab]) ", line):
                stack.compose(*found[1].split())
    assert run.returncode == 0, "".join(told)
    assert "The server's log says: simulate was executed once.\n" in told


def test_a_worker_that_lost_its_broker_turns_unhealthy_and_healthy_again(stack, shown):
    stack.compose("up", "--detach", "--wait", "worker-a")
    stack.compose("stop", "redis")
    wait_until_health(stack, "worker-a", "unhealthy")
    stack.compose("start", "redis")
    wait_until_health(stack, "worker-a", "healthy")


@pytest.fixture
def browser(stack, shown):
    """What the profile adds to the stack that is up, while the test runs. Builds the image, which has Chromium."""
    services = ["browser", "browser-worker-a", "browser-worker-b"]
    stack.compose("--profile", "browser", "build", "browser", timeout=900)
    stack.compose("up", "--detach", "--wait", *services)
    yield services
    stack.compose("rm", "--stop", "--force", *services)


def test_the_profile_browser_shows_one_page_on_two_hosts_and_returns(stack, browser):
    shown = stack.compose("run", "--rm", "-T", "browser-run")
    rows = re.findall(r"^(\w+) +(\S+) +session (\w{8}) (\w+), requests: \d+$", shown, re.MULTILINE)
    assert [(task, worker, how) for task, worker, _, how in rows] == [
        ("open_page", "a@browser-worker-a", "opened"),
        ("fill_in", "b@browser-worker-b", "resumed"),
        ("read_page", "a@browser-worker-a", "resumed"),
    ]
    assert len({session for _, _, session, _ in rows}) == 1
    assert shown.splitlines()[3:] == ["Soup for Ada"]
    for service in browser:
        assert stack.containers()[service]["State"]["Health"]["Status"] == "healthy", service
        assert stack.compose("exec", "-T", service, "id", "-u").strip() != "0", service


def wait_until_health(stack, service, health, seconds=120):
    deadline = time.monotonic() + seconds
    while (now := stack.containers()[service]["State"]["Health"]["Status"]) != health:
        assert time.monotonic() < deadline, f"{service} is {now}, not {health}, after {seconds} seconds"
        time.sleep(0.5)
