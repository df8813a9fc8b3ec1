"""What the oldest Celery that the package works with does not do, or not well: tests of it are skipped, and say so."""

import celery
import kombu
import pytest
from celery.result import AsyncResult

needs_celery_5_7 = pytest.mark.skipif(celery.VERSION[:2] < (5, 7), reason="Celery 5.6 does not do this")


def bear_with_publishers(config):
    """Keep what Celery 5.6 does wrong in a publisher, with any tasks, from failing the tests.

    A result that is collected after its app was closed unsubscribes there: on a new connection, which nobody closes, or
    in vain where there is no server any more. And redis-py dislikes how groups are saved.
    """
    if celery.VERSION[:2] < (5, 7):
        del AsyncResult.__del__
        config.addinivalue_line("filterwarnings", "ignore:Call to deprecated setex:DeprecationWarning")


def skip_without_quick_redelivery():
    """Skip the test unless `unacked_restore_interval` decides when Redis has a lost worker's messages sent again."""
    if kombu.VERSION[:2] < (5, 7):
        pytest.skip("kombu 5.6 has messages sent again every 100 s only")


def parameters(names, *, new):
    """All *names* for `parametrize`; those that are *new* need Celery 5.7."""
    assert set(new) <= set(names)
    return [pytest.param(name, marks=[needs_celery_5_7] if name in new else []) for name in names]
