"""A process that sends tasks by their names: it has Celery, and neither the tasks nor this package.

`bare_publisher.py BROKER WORKFLOW [HANDLE]` prints the result as JSON.
"""

import json
import sys

from celery import Celery, chain, chord


def workflow(app, name, handle):
    """Return one of the workflows that the tests ask for."""

    def step(task, *args, queue="a", **kwargs):
        return app.signature(f"project.{task}", args, kwargs).set(queue=queue)

    match name:
        case "task":
            return step("add", 1, 1)
        case "branches":
            return chain(
                step("add", 1, 1), chord([step("add", 1, queue="b"), step("plus_one")], step("total", queue="b"))
            )
        case "handle":
            return chain(step("recall", [], "kept", mcp_session=handle), step("tag"), step("recall", "kept", queue="b"))
    raise ValueError(name)


def main():
    broker, name, *handle = sys.argv[1:]
    app = Celery(broker=broker, backend=broker)
    print(json.dumps(workflow(app, name, *(handle or [None])).apply_async().get(timeout=60)))
    assert not any(module.startswith("mcp") for module in sys.modules)


if __name__ == "__main__":
    main()
