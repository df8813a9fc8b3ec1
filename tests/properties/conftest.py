"""Fixtures of the random canvases."""

import pytest
from trial import Trials


@pytest.fixture(scope="module")
def trials(valkey_server):
    with Trials(f"{valkey_server.connection_url}/7") as trials:
        yield trials
