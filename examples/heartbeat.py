"""Touches the file $HEARTBEAT_FILE at each heartbeat of a worker, every 2 seconds, for the health check of a container.

A worker that has lost its broker, or takes no messages for another reason, has none. Looking at the file is cheaper by
far than `celery inspect ping`. With `celery worker -I examples.heartbeat`, whatever the app.
"""

import os
from pathlib import Path

from celery.signals import heartbeat_sent

FILE = Path(os.environ["HEARTBEAT_FILE"])


@heartbeat_sent.connect
def touch(**_: object) -> None:
    FILE.touch()
