"""The canvas ahead of a task: find the next MCP tasks on every path, and bind handles into their signatures.

Celery publishes what follows a task from `request.chain` and `request.callbacks`, after the task has returned and from
those same objects. So a handle bound into a signature there is in the next message, and nothing of it is in the return
value.

Signatures are taken as the mappings that they are: `{"task", "args", "kwargs", "options", "subtask_type", ...}`.
"""

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from celery import maybe_signature
from celery.utils.saferepr import saferepr

from .exceptions import SessionHandleError
from .handle import SessionHandle

#: The reserved keyword argument by which handles travel: what `Carried.to_json` gives, or handles given by a user.
KEY = "mcp_session"

#: Of what `Carried.to_json` gives.
VERSION = 1

#: Celery's own tasks that call a task for each item of a list, in one process.
MAPS = frozenset({"celery.map", "celery.starmap"})
_CHUNKS = "celery.chunks"

#: A signature, as an object or as it came out of a message.
Signature = MutableMapping[str, Any]
#: Whether the task of this name takes a session.
IsMCPTask = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a `mcp_session` argument brings.

    Attributes:
        handles: Sessions in which the task has been counted as a holder, or which are its alone.
        given: Sessions that a user has given it, which nobody has counted yet.
        holder: The name under which it holds `handles`, its task ID; None where it has none.
        at: When it was bound, in seconds since the epoch.
        tentative: Not counted when it was bound, so the session may have ended: of errbacks of tasks further on.
    """

    handles: Sequence[SessionHandle] = ()
    given: Sequence[SessionHandle] = ()
    holder: str | None = None
    at: float = 0.0
    tentative: bool = False

    @property
    def all(self) -> list[SessionHandle]:
        """All handles, however they came."""
        return [*self.handles, *self.given]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types, which every serializer of Celery takes."""
        wire: dict[str, Any] = {"v": VERSION, "handles": [handle.to_json() for handle in self.handles]}
        if self.given:
            wire["given"] = [handle.to_json() for handle in self.given]
        if self.holder is not None:
            wire |= {"holder": self.holder, "at": int(self.at)}
        if self.tentative:
            wire["tentative"] = True
        return wire


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
        return [repr(handle) for handle in read(value).all]
    except SessionHandleError:
        return ["<unreadable session handle>"]


def read(value: Any) -> Carried:
    """Return what a `mcp_session` argument brings, in any of the forms that it may have.

    Raises:
        SessionHandleError: One of the handles cannot be read.
    """
    if value is None:
        return Carried()
    if isinstance(value, Mapping) and "handles" in value:
        if value.get("v", VERSION) != VERSION:
            raise SessionHandleError(
                f"The session handles of a message are of version {value['v']!r}, and this package reads {VERSION}: "
                "have workers and publishers use one release of mcp_celery"
            )
        try:
            handles, given = (list(map(SessionHandle.load, value.get(name, ()))) for name in ("handles", "given"))
            return Carried(
                handles=handles,
                given=given,
                holder=value.get("holder"),
                at=float(value.get("at", 0)),
                tentative=bool(value.get("tentative")),
            )
        except (TypeError, ValueError):
            raise SessionHandleError("The session handles of a message are not readable") from None
    values = value if isinstance(value, list | tuple) else [value]
    return Carried(given=[SessionHandle.load(item) for item in values])


def shown(kwargs: dict[str, Any]) -> str:
    """Return the `kwargsrepr` of *kwargs*, without the secrets of the handles in it."""
    return str(saferepr(redacted(kwargs), 1024))


def redacted(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return *kwargs*, of a task or of one of `MAPS`, with handles as they may be shown."""
    if KEY in kwargs:
        return {**kwargs, KEY: shown_handles(kwargs[KEY])}
    mapped = kwargs.get("task")
    if isinstance(mapped, Mapping) and KEY in (mapped.get("kwargs") or {}):
        return {**kwargs, "task": {**mapped, "kwargs": redacted(mapped["kwargs"])}}
    return kwargs


def without_handles(value: Any) -> Any:
    """Return *value*, arguments of a task, with all handles in it, of signatures too, as they may be shown."""
    if isinstance(value, Mapping):
        return {key: shown_handles(item) if key == KEY else without_handles(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_handles(item) for item in value]
    return value


@dataclass
class Ahead:
    """The signatures that a session goes on to."""

    #: Those that come next.
    tasks: list[Signature] = field(default_factory=list)
    #: Those that come next only where something fails that passes no session on.
    errbacks: list[Signature] = field(default_factory=list)
    #: Errbacks that are never called, although others may take them for such as are.
    untold: list[Signature] = field(default_factory=list)


def bind(
    handle: SessionHandle, signatures: Iterable[Signature], parent: str, *, tentative: bool = False
) -> dict[str, str]:
    """Bind *handle* into *signatures*; return task ID and task name of those that have it now.

    A signature without an ID (a link) gets one, the same one when *parent* binds again after its worker was lost. One
    that was given another session of the server keeps that.
    """
    bound = {}
    for number, signature in enumerate(signatures):
        if _takes(handle, signature):
            if not signature["options"].get("task_id"):
                signature["options"]["task_id"] = str(uuid5(NAMESPACE_OID, f"{parent}/{number}"))
            holder, name = _bind_one(handle, signature, tentative)
            bound[holder] = name
    return bound


def _place(signature: Signature) -> Signature:
    """Return the signature whose arguments take the handle: the mapped one, where *signature* maps."""
    inner: Signature = signature["kwargs"]["task"] if signature["task"] in MAPS else signature
    return inner


def _takes(handle: SessionHandle, signature: Signature) -> bool:
    try:
        present = read(_place(signature)["kwargs"].get(KEY))
    except SessionHandleError:
        return False  # The user gave this step a bad one, and it will say so when it runs.
    return all(other.server != handle.server or other.session_id == handle.session_id for other in present.all)


def _bind_one(handle: SessionHandle, signature: Signature, tentative: bool) -> tuple[str, str]:
    place, options = _place(signature), signature["options"]
    holder = str(options["task_id"])
    present = read(place["kwargs"].get(KEY))
    handles = [other for other in present.handles if other.server != handle.server]
    given = [other for other in present.given if other.server != handle.server]
    tentative = tentative or (present.tentative and bool(handles))
    carried = Carried(handles=[*handles, handle], given=given, holder=holder, at=time.time(), tentative=tentative)
    # New mappings: cloned signatures may share theirs.
    kwargs = {**place["kwargs"], KEY: carried.to_json()}
    mapped = place is not signature
    signature["kwargs"] = {**signature["kwargs"], "task": {**place, "kwargs": kwargs}} if mapped else kwargs
    # For a worker that publishes this signature without knowing its task.
    options["kwargsrepr"] = shown(signature["kwargs"])
    return holder, place["task"]


def carried(signatures: Iterable[Signature]) -> list[tuple[SessionHandle, dict[str, str]]]:
    """Return each session that was bound into *signatures* by `bind`, with ID and name of the tasks bound to.

    What a user gave to a step is not among them.
    """
    found: dict[str, tuple[SessionHandle, dict[str, str]]] = {}
    for signature in signatures:
        place = _place(signature)
        try:
            session = read(place["kwargs"].get(KEY))
        except SessionHandleError:
            continue
        for handle in session.handles:
            if session.holder is not None:
                found.setdefault(handle.key, (handle, {}))[1][session.holder] = place["task"]
    return list(found.values())


class Canvas:
    """Finds the signatures that a session goes on to.

    A path is followed up to the first MCP task on it, which passes the session on in its turn; other tasks pass
    nothing on, so they are looked past. The body of a chord is found as well as the header: no member of the header
    knows which one is last.
    """

    def __init__(self, is_mcp_task: IsMCPTask) -> None:
        self._is_mcp_task = is_mcp_task

    def ahead_of(self, request: Any) -> Ahead:
        """Return what comes next when the task of *request* has succeeded.

        Without the body of its chord, which got its session with the header, from the task before both. A session
        that one member of a header has opened is not the body's.
        """
        ahead = Ahead()
        for callback in _listed(request.callbacks):
            self._visit(callback, ahead)
        self._visit_in_turn(reversed(_listed(request.chain)), ahead)
        return ahead

    def within(self, signature: Signature) -> Ahead:
        """Return what comes first in *signature*, which may be any shape of canvas."""
        ahead = Ahead()
        self._visit(signature, ahead)
        return ahead

    def errbacks_of(self, request: Any) -> list[Signature]:
        """Return the MCP tasks that run when the task of *request* has failed."""
        return self._errbacks(request.errbacks)

    def hopeless_after(self, request: Any) -> Ahead:
        """Return what can never run once the task of *request* has failed: all that follows, and the body of its chord.

        As errbacks, what runs instead.

        A step of a chain within a header does not know the chord; the last step of that chain does.
        """
        hopeless = Ahead()
        for step in (*_listed(request.callbacks), *_listed(request.chain)):
            hopeless.tasks += self.all_in(step)
        if isinstance(request.chord, MutableMapping):
            self._give_up(request.chord, hopeless)
        for step in _listed(request.chain):
            self._give_up_chords_of(step, hopeless)
        return hopeless

    def _give_up(self, body: Signature, hopeless: Ahead, *, is_told: bool = True) -> None:
        """Add the body of a chord whose header fails, and what that body would have led to.

        A chord that has this body in its own header is not told by Celery: it never ends, and calls no errbacks.
        """
        hopeless.tasks += self.all_in(body)
        options = body.get("options") or {}
        errbacks = hopeless.errbacks if is_told else hopeless.untold
        errbacks += self._errbacks_instead_of(body)
        if isinstance(outer := options.get("chord"), MutableMapping):
            self._give_up(outer, hopeless, is_told=False)
        for step in _listed(options.get("chain")):
            self._give_up_chords_of(step, hopeless, is_told=is_told)

    def _give_up_chords_of(self, step: Signature, hopeless: Ahead, *, is_told: bool = True) -> None:
        """Add the bodies of the chords that wait for *step*, which never runs."""
        if isinstance(body := (step.get("options") or {}).get("chord"), MutableMapping):
            self._give_up(body, hopeless, is_told=is_told)
        match step.get("subtask_type"):
            case "chord" if step["kwargs"]["body"] is not None:
                self._give_up_chords_of(step["kwargs"]["body"], hopeless, is_told=is_told)
            case "group" | "chain":
                for member in _listed(step["kwargs"]["tasks"]):
                    self._give_up_chords_of(member, hopeless, is_told=False)

    def all_in(self, signature: Signature) -> list[Signature]:
        """Return all MCP tasks in *signature*, also those that come after others.

        Those may have sessions as well: what was between may have been a plain task, which was then replaced.
        """
        kwargs, options = signature["kwargs"], signature.get("options") or {}
        parts: list[Signature] = [*_listed(options.get("link")), *_listed(options.get("chain"))]
        maps = signature["task"] in MAPS and self._is_mapped(signature)
        found = []
        match signature.get("subtask_type"):
            case "chain" | "group":
                parts += _listed(kwargs["tasks"])
            case "chord":
                parts += [*_members(kwargs["header"]), *_listed(kwargs["body"])]
            case _ if self._is_mcp_task(signature["task"]) or maps:
                found.append(signature)
        return found + [task for part in parts for task in self.all_in(part)]

    def _visit_in_turn(self, signatures: Iterable[Signature], ahead: Ahead) -> bool:
        return any(self._visit(signature, ahead) for signature in signatures)

    def _visit(self, signature: Signature, ahead: Ahead) -> bool:
        """Add to *ahead*. True where what comes after *signature* will get the session from it."""
        if signature["task"] == _CHUNKS and self._is_mapped(signature):
            # Celery publishes a group of maps in its place. Taken apart here, each has its ID when it is bound.
            _replace(signature, maybe_signature(dict(signature)).group())
        kwargs = signature["kwargs"]
        match signature.get("subtask_type"):
            case "chain":
                carries = self._visit_in_turn(_listed(kwargs["tasks"]), ahead)
            case "group":
                for member in _listed(kwargs["tasks"]):
                    self._visit(member, ahead)
                # Branches do not merge: what follows a group is found by itself.
                carries = False
            case "chord":
                for member in _members(kwargs["header"]):
                    self._visit(member, ahead)
                carries = kwargs["body"] is not None and self._visit_body(kwargs["body"], ahead)
            case _ if self._is_mcp_task(signature["task"]):
                ahead.tasks.append(signature)
                return True
            case _:
                if signature["task"] in MAPS and self._is_mapped(signature):
                    ahead.tasks.append(signature)  # but it passes nothing on
                carries = False
                ahead.errbacks += self._errbacks((signature.get("options") or {}).get("link_error"))
        return self._visit_options(signature, ahead) or carries

    def _visit_body(self, body: Signature, ahead: Ahead) -> bool:
        """The body of a chord: its errbacks run where a member of the header fails, so without it."""
        ahead.errbacks += self._errbacks_instead_of(body)
        if body.get("subtask_type") == "chain" and (steps := _listed(body["kwargs"]["tasks"])):
            # Where the chord is itself a step of a chain, Celery publishes the first step as its body.
            ahead.errbacks += self._errbacks_instead_of(steps[0])
        return self._visit(body, ahead)

    def _errbacks_instead_of(self, body: Signature) -> list[Signature]:
        """Return the errbacks that Celery calls where the header of *body* fails: of a group, those of its members."""
        members = _listed(body["kwargs"]["tasks"]) if body.get("subtask_type") == "group" else []
        own = self._errbacks((body.get("options") or {}).get("link_error"))
        return own + [errback for member in members for errback in self._errbacks_of_result(member)]

    def _errbacks_of_result(self, signature: Signature) -> list[Signature]:
        """As Celery does: of a chord those of its body too, of a chain its own only."""
        own = self._errbacks((signature.get("options") or {}).get("link_error"))
        match signature.get("subtask_type"):
            case "chord" if signature["kwargs"]["body"] is not None:
                return own + self._errbacks_of_result(signature["kwargs"]["body"])
            case "group":
                return own + [
                    errback
                    for member in _listed(signature["kwargs"]["tasks"])
                    for errback in self._errbacks_of_result(member)
                ]
        return own

    def _visit_options(self, signature: Signature, ahead: Ahead) -> bool:
        """Look past a signature that passes nothing on, to what it was linked with."""
        options = signature.get("options") or {}
        for link in _listed(options.get("link")):
            self._visit(link, ahead)
        return self._visit_in_turn(reversed(_listed(options.get("chain"))), ahead)

    def _errbacks(self, signatures: Any) -> list[Signature]:
        found = Ahead()
        for signature in _listed(signatures):
            self._visit(signature, found)
        return found.tasks

    def _is_mapped(self, signature: Signature) -> bool:
        mapped = signature["kwargs"].get("task")
        return isinstance(mapped, MutableMapping) and self._is_mcp_task(mapped["task"])


def _replace(signature: Signature, by: Signature) -> None:
    """Make *signature* another one, in place."""
    options = {**by["options"], **signature["options"]}
    signature.clear()
    signature.update({**by, "options": options})


def _listed(value: Any) -> list[Signature]:
    if value is None:
        return []
    return [value] if isinstance(value, MutableMapping) else list(value)


def _members(header: Any) -> list[Signature]:
    """Return the members of a chord's header, which is a group or a list."""
    if isinstance(header, MutableMapping) and header.get("subtask_type") == "group":
        return _listed(header["kwargs"]["tasks"])
    return _listed(header)
