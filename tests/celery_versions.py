"""What the oldest Celery that the package works with does not do: tests of it are skipped there, and say so."""

import celery
import kombu
import pytest

needs_celery_5_7 = pytest.mark.skipif(celery.VERSION[:2] < (5, 7), reason="Celery 5.6 does not do this")


def skip_without_quick_redelivery():
    """Skip the test unless `unacked_restore_interval` decides when Redis has a lost worker's messages sent again."""
    if kombu.VERSION[:2] < (5, 7):
        pytest.skip("kombu 5.6 has messages sent again every 100 s only")


def parameters(names, *, new):
    """All *names* for `parametrize`; those that are *new* need Celery 5.7."""
    assert set(new) <= set(names)
    return [pytest.param(name, marks=[needs_celery_5_7] if name in new else []) for name in names]
