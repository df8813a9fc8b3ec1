"""What the oldest Celery that the package works with does not do, or not well: tests of it are skipped, and say so."""

import celery
import kombu
import pytest

#: What publishers of Celery 5.6 warn of, whatever the tasks. A result that is collected after its app was closed has
#: its backend connect again to unsubscribe, or try to where there is no server any more; nobody closes that connection.
WARNINGS_OF_CELERY_5_6 = [
    "ignore:Call to deprecated setex:DeprecationWarning",
    "ignore:unclosed <socket.socket:ResourceWarning",
    "ignore:Exception ignored in. <function AsyncResult.__del__:pytest.PytestUnraisableExceptionWarning",
]

needs_celery_5_7 = pytest.mark.skipif(celery.VERSION[:2] < (5, 7), reason="Celery 5.6 does not do this")


def pass_over_warnings(config):
    """Have `pytest` ignore what only Celery 5.6 warns of."""
    if celery.VERSION[:2] < (5, 7):
        for line in WARNINGS_OF_CELERY_5_6:
            config.addinivalue_line("filterwarnings", line)


def skip_without_quick_redelivery():
    """Skip the test unless `unacked_restore_interval` decides when Redis has a lost worker's messages sent again."""
    if kombu.VERSION[:2] < (5, 7):
        pytest.skip("kombu 5.6 has messages sent again every 100 s only")


def parameters(names, *, new):
    """All *names* for `parametrize`; those that are *new* need Celery 5.7."""
    assert set(new) <= set(names)
    return [pytest.param(name, marks=[needs_celery_5_7] if name in new else []) for name in names]
