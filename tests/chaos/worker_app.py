"""What the workers run: the app of `workload`, with named points at which they kill themselves, and shorter times."""

# Loaded before the fork, so that a child that takes the place of a killed one is ready at once.
import points
from workload import Settings, new_app

import mcp_celery.session  # noqa: F401
from mcp_celery import journal, redis_store

#: What a harness cannot wait for; the rest is as users have it.
journal.LEASE_SECONDS = 3.0
journal.POLL_SECONDS = 0.2
redis_store.ENDING_SECONDS = 3.0
redis_store.ABANDONED_SECONDS = 2.0

settings = Settings.from_environment()
app = new_app(settings)
points.install(app, settings)
