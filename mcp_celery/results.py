"""What result backends keep of tasks that never run: their arguments, without the handles bound into them.

Where a task fails, Celery stores the failure for all that would have followed in its chain as well; with their
arguments, if `result_extended` is set. It does so before any signal tells of it, so what makes these records is wrapped
here.
"""

from copy import copy
from functools import wraps
from typing import Any

from celery.backends.base import Backend

from .workflow import without_handles

_get_result_meta = Backend._get_result_meta  # noqa: SLF001 - there is no public place


@wraps(_get_result_meta)
def _without_handles(self: Any, result: Any, state: Any, traceback: Any, request: Any, **options: Any) -> Any:
    if request and self.app.conf.find_value_for_key("extended", "result"):
        request = copy(request)
        for name in ("args", "kwargs"):
            setattr(request, name, without_handles(getattr(request, name, None)))
    return _get_result_meta(self, result=result, state=state, traceback=traceback, request=request, **options)


Backend._get_result_meta = _without_handles  # noqa: SLF001 - as above
