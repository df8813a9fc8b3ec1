"""Workers that do not have each other's tasks."""

import subprocess
import sys

from processes import wait_until
from redis import Redis
from test_chain import CALL, HANDSHAKE, calls_and_handshake

PUBLISH = """
import sys
from celery import Celery, chain, signature

app = Celery("publisher", broker=sys.argv[1], backend=sys.argv[1])
steps = [signature("apart.opens", ("1",), queue="opens"), signature("apart.reads", immutable=True, queue="reads")]
print(chain(*steps, app=app).apply_async().get(timeout=60))
"""


def test_a_session_goes_on_to_a_task_that_only_another_worker_has(recorded_peer, valkey, start_worker):
    recorder = recorded_peer("python")
    for name in ("opens", "reads"):
        env = {"BROKER": valkey, "PEER": recorder.url, "HAS": name}
        start_worker("apart", name, "-Q", name, env=env)
    with Redis.from_url(valkey, decode_responses=True) as client:
        both = {"apart.opens", "apart.reads"}
        wait_until(
            lambda: set(client.zrange("{mcp_celery}:tasks", 0, -1)) >= both, 10, "the workers to know each other"
        )
    command = [sys.executable, "-c", PUBLISH, valkey]
    published = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert published.stdout.strip() == "1", published.stderr
    recorder.wait_for(lambda exchange: exchange.method == "DELETE" and exchange.ended is not None)
    assert calls_and_handshake(recorder.methods()) == [*HANDSHAKE, CALL, CALL, "DELETE"]
