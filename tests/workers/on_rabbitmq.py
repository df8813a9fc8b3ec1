"""`project` or `durable`, with another configuration: RabbitMQ as broker."""

import importlib
import json
import os

tasks = importlib.import_module(os.environ["PROJECT"])
app = tasks.app
app.conf.update(json.loads(os.environ["CONF"]))
