"""The canvas ahead of a task: find the next MCP tasks on every path, and bind handles into their signatures.

Celery publishes what follows a task from `request.chain`, `request.callbacks` and `request.chord`, after the task has
returned and from those same objects. So a handle bound into a signature there is in the next message, and nothing of
it is in the return value.

Signatures are taken as the mappings that they are: `{"task", "args", "kwargs", "options", "subtask_type", ...}`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
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
    return str(saferepr({**kwargs, KEY: read_handles(kwargs[KEY])} if KEY in kwargs else kwargs, 1024))


class Binder:
    """Binds a handle into the next MCP tasks ahead.

    A path is followed up to the first MCP task on it, which binds on in its turn; other tasks pass nothing on, so they
    are looked past. The body of a chord is bound as well as the header: no member of the header knows which one is
    last.

    Attributes:
        bound: The task IDs of the signatures that were bound, in the order in which they were met.
    """

    def __init__(self, handle: SessionHandle, is_mcp_task: IsMCPTask) -> None:
        self._handle = handle
        self._is_mcp_task = is_mcp_task
        self.bound: list[str] = []

    def bind_ahead(self, request: Any) -> None:
        """Bind into everything that Celery will publish when the task of *request* has succeeded.

        Not into `request.chord`: the body was bound with the header, by the task before both. A session that one
        member of the header opened is not the body's.
        """
        for callback in _listed(request.callbacks):
            self.bind(callback)
        self.bind_sequence(reversed(_listed(request.chain)))

    def bind_sequence(self, signatures: Iterable[Signature]) -> bool:
        """Bind into the first of *signatures* that passes the session on. False where none does."""
        return any(self.bind(signature) for signature in signatures)

    def bind(self, signature: Signature) -> bool:
        """Bind into *signature*. True where what comes after it will get the session from it."""
        kwargs = signature["kwargs"]
        match signature.get("subtask_type"):
            case "chain":
                carries = self.bind_sequence(_listed(kwargs["tasks"]))
            case "group":
                for member in _listed(kwargs["tasks"]):
                    self.bind(member)
                # Branches do not merge: what follows a group is bound itself.
                carries = False
            case "chord":
                for member in _members(kwargs["header"]):
                    self.bind(member)
                carries = kwargs["body"] is not None and self.bind(kwargs["body"])
            case _ if self._is_mcp_task(signature["task"]):
                self._bind_task(signature)
                return True
            case _:
                carries = False
        return self._bind_options(signature) or carries

    def _bind_task(self, signature: Signature) -> None:
        others = []
        try:
            present = read_handles(signature["kwargs"].get(KEY))
        except SessionHandleError:
            return  # The user gave this step a bad one, and it will say so when it runs.
        for handle in present:
            if handle.server != self._handle.server:
                others.append(handle)
            elif handle.session_id != self._handle.session_id:
                return  # The user gave this step another session of the server.
        # As plain JSON, which every serializer of Celery takes. A new mapping: cloned signatures may share theirs.
        carried = [handle.to_json() for handle in (*others, self._handle)]
        kwargs = signature["kwargs"] = {**signature["kwargs"], KEY: carried}
        options = signature["options"]
        # For a worker that publishes this signature without knowing its task.
        options["kwargsrepr"] = shown(kwargs)
        if not options.get("task_id"):
            options["task_id"] = uuid()
        self.bound.append(options["task_id"])

    def _bind_options(self, signature: Signature) -> bool:
        """Look past a signature that passes nothing on, to what it was linked with."""
        options = signature.get("options") or {}
        for link in _listed(options.get("link")):
            self.bind(link)
        return self.bind_sequence(reversed(_listed(options.get("chain"))))


def _listed(value: Any) -> list[Signature]:
    if value is None:
        return []
    return [value] if isinstance(value, MutableMapping) else list(value)


def _members(header: Any) -> Iterator[Signature]:
    """The members of a chord's header, which is a group or a list."""
    if isinstance(header, MutableMapping) and header.get("subtask_type") == "group":
        yield from _listed(header["kwargs"]["tasks"])
    else:
        yield from _listed(header)
