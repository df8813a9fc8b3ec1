"""Fixtures: an engine of containers, and apps on separate hosts in it."""

import gc
import warnings
from pathlib import Path

import docker
import pytest
from hosts import Hosts, Network, RabbitMQ, Redis
from requests.exceptions import RequestException

HERE = Path(__file__).parent


def problem_of_engine():
    """Why there is no Docker engine to test with; an empty text where one answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a client that reaches no engine
        try:
            docker.from_env(timeout=10).close()
        except (docker.errors.DockerException, RequestException) as exc:
            return f"no Docker engine answers: {exc}"
        finally:
            gc.collect()
    return ""


def pytest_collection_modifyitems(items):
    """Skip all tests here where there is no engine; give them time, of which builds of images take none."""
    ours = [item for item in items if item.path.parent == HERE]
    problem = ours and problem_of_engine()
    for item in ours:
        item.add_marker(pytest.mark.timeout(600, func_only=True))
        if problem:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="session")
def engine():
    """A client of the Docker engine."""
    client = docker.from_env(timeout=120)
    yield client
    client.close()


@pytest.fixture(scope="session")
def image(engine):
    """The image of workers and server, with the project installed; those of the brokers are there as well."""
    for name in (Redis.image(), RabbitMQ.image()):
        try:
            engine.images.get(name)
        except docker.errors.ImageNotFound:
            engine.images.pull(name)
    image, _ = engine.images.build(
        path=str(HERE.parents[1]),
        dockerfile="tests/containers/Dockerfile",
        tag="mcp-celery-tests",
        rm=True,
        forcerm=True,
    )
    return image.id


@pytest.fixture
def network(engine, image):
    """A network of containers, which are gone with it at the end of the test; where it fails, their logs are shown."""
    network = Network(engine, image)
    yield network
    try:
        for name, log in network.logs().items():
            print(f"--- {name}\n{log}")
    finally:
        network.remove()


@pytest.fixture
def start(network):
    """`start(broker, redis=None, **options)` returns `Hosts` without workers.

    At the end of the test, no log of any of their containers may hold the ID of a session.
    """
    started = []

    def start(broker, redis=None, **options):
        started.append(Hosts(network, broker, redis, **options))
        return started[-1]

    yield start
    for hosts in started:
        hosts.teardown()
        hosts.assert_no_log_holds(hosts.sessions())
