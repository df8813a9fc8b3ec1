"""`project` without any server: its broker is a folder, and its results are messages, as with RabbitMQ and `rpc://`."""

import os
import time
import uuid
from pathlib import Path

from kombu.transport import filesystem
from kombu.utils.json import dumps
from project import *  # noqa: F403 - the tasks
from project import app

_folder = os.environ["FOLDER"]


class WholeMessages(filesystem.Channel):
    """Shows a message once it is written: kombu's own is read as an empty one now and then, which ends a worker."""

    def _put(self, queue, payload, **_):
        name = f"{time.monotonic_ns():020d}_{uuid.uuid4()}"
        written = Path(self.data_folder_out, f"{name}.part")
        written.write_text(dumps(payload))
        written.rename(written.with_name(f"{name}.{queue}.msg"))


filesystem.Transport.Channel = WholeMessages

app.conf.update(
    result_backend="rpc://" if os.environ["RESULTS"] == "yes" else None,
    broker_transport_options={
        "data_folder_in": f"{_folder}/messages",
        "data_folder_out": f"{_folder}/messages",
        "control_folder": f"{_folder}/control",
        "polling_interval": 0.05,
    },
    worker_send_task_events=False,
    task_send_sent_event=False,
)
