"""What the workflows of the tests are made of: signatures of the tasks of a project, and short ways to join them."""

from itertools import cycle


class Steps:
    """Signatures of the tasks of a project, routed to its two workers in turn: `steps.add(1)` is `add.s(1)`."""

    def __init__(self, tasks):
        self.tasks = tasks
        self._queues = cycle("ab")

    def __getattr__(self, name):
        return lambda *args, **kwargs: getattr(self.tasks, name).s(*args, **kwargs).set(queue=next(self._queues))


def still(signature):
    """*signature*, which takes nothing of what comes before it, as `.si()` makes it."""
    return signature.set(immutable=True)


def linked(signature, *links):
    """*signature*, with *links*."""
    for link in links:
        signature.link(link)
    return signature


def failed_by(signature, *errbacks):
    """*signature*, with *errbacks*."""
    for errback in errbacks:
        signature.link_error(errback)
    return signature
