"""What a worker's main process shows of MCP tasks: requests and log lines without the session IDs in them."""

import logging
import re
from typing import Any

from celery.app.task import Context
from celery.worker.request import Request

from .workflow import KEY, Given, shown, shown_handles

#: Celery prints whole messages there: at DEBUG what goes to the pool, at ERROR a message whose task is not registered.
_MESSAGE_LOGGERS = ("celery.pool", "celery.worker.consumer.consumer")
_FROM_HANDLE_ON = re.compile(rf"{KEY}.*", re.DOTALL)


class MCPRequest(Request):
    """A worker's request whose arguments, as `celery inspect` and results show them, hold no session ID."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kwargs: dict[str, Any]
        self.mcp_session = Given(self._kwargs.get(KEY))
        if self.mcp_session.value is not None:
            # What a publisher that does not know the task has put there shows a handle whole.
            self._kwargsrepr = self._request_dict["kwargsrepr"] = shown(self._kwargs)
            redacted = {**self._kwargs, KEY: shown_handles(self.mcp_session.value)}
            self._kwargs = self._request_dict["kwargs"] = redacted

    @property
    def _context(self) -> Context:
        """The context of failures and retries in the main process, which resume the session."""
        context = self.__dict__.get("mcp_context")
        if context is None:
            context = self.mcp_context = super()._context
            context.kwargs = {key: value for key, value in context.kwargs.items() if key != KEY}
            context.mcp_session = self.mcp_session
        return context


def _cut_handles(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if KEY in text:
        record.msg, record.args = _FROM_HANDLE_ON.sub(f"{KEY} ... (left out: it holds a session ID)", text), ()
    return True


for _name in _MESSAGE_LOGGERS:
    logging.getLogger(_name).addFilter(_cut_handles)
