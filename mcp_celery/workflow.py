"""The canvas ahead of a task: find the next MCP tasks on every path, and bind handles into their signatures.

Celery publishes what follows a task from `request.chain` and `request.callbacks`, after the task has returned and from
those same objects. So a handle bound into a signature there is in the next message, and nothing of it is in the return
value.

Signatures are taken as the mappings that they are: `{"task", "args", "kwargs", "options", "subtask_type", ...}`.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from celery import uuid
from celery.utils.saferepr import saferepr

from .exceptions import SessionHandleError
from .handle import SessionHandle

#: The reserved keyword argument by which handles travel: one handle, given explicitly, or a list of those carried.
KEY = "mcp_session"

#: A signature, as an object or as it came out of a message.
Signature = MutableMapping[str, Any]
#: Whether the task of this name takes a session.
IsMCPTask = Callable[[str], bool]


class Given:
    """A `mcp_session` argument as it came, in a request: where its `repr` may be printed."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"<Given {shown_handles(self.value)}>"


def shown_handles(value: Any) -> list[str]:
    """Return what may be shown of a `mcp_session` argument, which may be a bad one."""
    try:
        return [repr(handle) for handle in read_handles(value)]
    except SessionHandleError:
        return ["<unreadable session handle>"]


def read_handles(value: Any) -> list[SessionHandle]:
    """Return the handles of a `mcp_session` argument, in any of the forms that it may have.

    Raises:
        SessionHandleError: One of them cannot be read.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [SessionHandle.load(item) for item in value]
    return [SessionHandle.load(value)]


def shown(kwargs: Mapping[str, Any]) -> str:
    """Return the `kwargsrepr` of *kwargs*, without the secrets of the handles in it."""
    return str(saferepr({**kwargs, KEY: shown_handles(kwargs[KEY])} if KEY in kwargs else kwargs, 1024))


def bind(handle: SessionHandle, signatures: Iterable[Signature]) -> list[str]:
    """Bind *handle* into *signatures*, and return the task IDs of those that have it now.

    A signature without an ID (a link) gets one. One that was given another session of the server keeps that.
    """
    return [_bind_one(handle, signature) for signature in signatures if _takes(handle, signature)]


def _takes(handle: SessionHandle, signature: Signature) -> bool:
    try:
        present = read_handles(signature["kwargs"].get(KEY))
    except SessionHandleError:
        return False  # The user gave this step a bad one, and it will say so when it runs.
    return all(other.server != handle.server or other.session_id == handle.session_id for other in present)


def _bind_one(handle: SessionHandle, signature: Signature) -> str:
    kwargs, options = signature["kwargs"], signature["options"]
    others = [other for other in read_handles(kwargs.get(KEY)) if other.server != handle.server]
    # As plain JSON, which every serializer of Celery takes. A new mapping: cloned signatures may share theirs.
    kwargs = signature["kwargs"] = {**kwargs, KEY: [other.to_json() for other in (*others, handle)]}
    # For a worker that publishes this signature without knowing its task.
    options["kwargsrepr"] = shown(kwargs)
    if not options.get("task_id"):
        options["task_id"] = uuid()
    return str(options["task_id"])


def carried(signatures: Iterable[Signature]) -> list[tuple[SessionHandle, list[str]]]:
    """Return each session that was bound into *signatures* by `bind`, with the IDs of the tasks that it was bound to.

    What a user gave to a step is not among them.
    """
    found: dict[str, tuple[SessionHandle, list[str]]] = {}
    for signature in signatures:
        value = signature["kwargs"].get(KEY)
        for handle in read_handles(value) if isinstance(value, list) else []:
            found.setdefault(handle.key, (handle, []))[1].append(signature["options"]["task_id"])
    return list(found.values())


class Canvas:
    """Finds the signatures that a session goes on to.

    A path is followed up to the first MCP task on it, which passes the session on in its turn; other tasks pass
    nothing on, so they are looked past. The body of a chord is found as well as the header: no member of the header
    knows which one is last.
    """

    def __init__(self, is_mcp_task: IsMCPTask) -> None:
        self._is_mcp_task = is_mcp_task

    def ahead_of(self, request: Any) -> list[Signature]:
        """Return the MCP tasks that come next when the task of *request* has succeeded.

        Without the body of its chord, which got its session with the header, from the task before both. A session
        that one member of a header has opened is not the body's.
        """
        found: list[Signature] = []
        for callback in _listed(request.callbacks):
            self._visit(callback, found)
        self._visit_in_turn(reversed(_listed(request.chain)), found)
        return found

    def within(self, signature: Signature) -> list[Signature]:
        """Return the MCP tasks that come first in *signature*, which may be any shape of canvas."""
        found: list[Signature] = []
        self._visit(signature, found)
        return found

    def hopeless_after(self, request: Any) -> list[Signature]:
        """Return the MCP tasks that can never run once the task of *request* has failed: at the body of its chord.

        A step of a chain within a header does not know the chord; the last step of that chain does.
        """
        found: list[Signature] = []
        for body in (request.chord, *(step["options"].get("chord") for step in _listed(request.chain))):
            if isinstance(body, MutableMapping):
                self._visit(body, found)
        return found

    def _visit_in_turn(self, signatures: Iterable[Signature], found: list[Signature]) -> bool:
        return any(self._visit(signature, found) for signature in signatures)

    def _visit(self, signature: Signature, found: list[Signature]) -> bool:
        """Add to *found*. True where what comes after *signature* will get the session from it."""
        kwargs = signature["kwargs"]
        match signature.get("subtask_type"):
            case "chain":
                carries = self._visit_in_turn(_listed(kwargs["tasks"]), found)
            case "group":
                for member in _listed(kwargs["tasks"]):
                    self._visit(member, found)
                # Branches do not merge: what follows a group is found by itself.
                carries = False
            case "chord":
                for member in _members(kwargs["header"]):
                    self._visit(member, found)
                carries = kwargs["body"] is not None and self._visit(kwargs["body"], found)
            case _ if self._is_mcp_task(signature["task"]):
                found.append(signature)
                return True
            case _:
                carries = False
        return self._visit_options(signature, found) or carries

    def _visit_options(self, signature: Signature, found: list[Signature]) -> bool:
        """Look past a signature that passes nothing on, to what it was linked with."""
        options = signature.get("options") or {}
        for link in _listed(options.get("link")):
            self._visit(link, found)
        return self._visit_in_turn(reversed(_listed(options.get("chain"))), found)


def _listed(value: Any) -> list[Signature]:
    if value is None:
        return []
    return [value] if isinstance(value, MutableMapping) else list(value)


def _members(header: Any) -> list[Signature]:
    """Return the members of a chord's header, which is a group or a list."""
    if isinstance(header, MutableMapping) and header.get("subtask_type") == "group":
        return _listed(header["kwargs"]["tasks"])
    return _listed(header)
