"""Celery tasks that share one MCP session across a workflow, on whatever worker each step runs.

Importing this package loads Celery, and neither the MCP SDK nor an HTTP client: those come with the first use of a
session, in the worker.
"""

from ._version import __version__
from .exceptions import (
    CallInterruptedError,
    ConfigurationError,
    JournalError,
    JournalMismatchError,
    MCPCeleryError,
    SessionError,
    SessionHandleError,
    SessionLostError,
    StoreError,
    SupersededError,
    ToolError,
    TransportError,
)
from .handle import SessionHandle
from .task import MCPTask
from .tools import tool

__all__ = [
    "CallInterruptedError",
    "ConfigurationError",
    "JournalError",
    "JournalMismatchError",
    "MCPCeleryError",
    "MCPTask",
    "SessionError",
    "SessionHandle",
    "SessionHandleError",
    "SessionLostError",
    "StoreError",
    "SupersededError",
    "ToolError",
    "TransportError",
    "__version__",
    "tool",
]
