"""What the workers of a soak run."""

import gc
from itertools import count

from celery.signals import task_postrun
from soak_tasks import Settings, new_app

#: A process collects all garbage after so many tasks. By itself Python does so once a quarter of its objects are new,
#: which takes minutes here: a task that fails leaves thousands in cycles, in Celery (5.7) alone 2400.
COLLECT_AFTER = 25

app = new_app(Settings.from_environment())
ended = count(1)


@task_postrun.connect
def collect(**_: object) -> None:
    if next(ended) % COLLECT_AFTER == 0:
        gc.collect()
