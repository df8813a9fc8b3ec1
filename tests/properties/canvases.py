"""Random canvases: what they are made of, how Celery writes them, and which sessions should flow where in them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

from celery import chain, chord, group
from hypothesis import assume
from hypothesis import strategies as st

#: The two MCP servers of the tests.
SERVERS = ("one", "two")
#: How often a step may ask for a retry before that is refused.
MAX_RETRIES = 2


class Shown:
    """Is printed as its `repr`, also by Hypothesis."""

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))


@dataclass(frozen=True, kw_only=True)
class Step(Shown):
    """A task, and what it does when it runs.

    Attributes:
        label: Unique in its canvas.
        role: "step"; "errback", which gets a task ID; or "called back", which is called where its task has failed.
        is_mcp: Whether it takes sessions.
        at_start: The servers whose sessions it uses when it begins,
        at_end: and when it ends. Between the two others may run.
        end: "returns", "raises", "ignores", "rejects", or "requeues" (and returns when it is redelivered).
        retries: How many retries it asks for before that end; more than `MAX_RETRIES` are refused.
        is_auto: Whether it asks by raising (`autoretry_for`).
        replacement: What it is replaced with in place of its end.
    """

    label: str = ""
    role: str = "step"
    is_mcp: bool = False
    is_immutable: bool = False
    at_start: tuple[str, ...] = ()
    at_end: tuple[str, ...] = ()
    end: str = "returns"
    retries: int = 0
    is_auto: bool = False
    replacement: "Canvas | None" = None
    links: "tuple[Canvas, ...]" = ()
    errbacks: "tuple[Step, ...]" = ()

    def __repr__(self) -> str:
        uses = "|".join(",".join(servers) for servers in (self.at_start, self.at_end)) if self.is_mcp else ""
        marks = {"returns": "", "raises": "!", "ignores": "?", "rejects": "#", "requeues": "@"}[self.end]
        retries = f"~{'auto' if self.is_auto else ''}{self.retries}" if self.retries else ""
        text = f"{self.label}{marks}{retries}{'.si' if self.is_immutable else ''}({uses})"
        text += f".replaced_by({self.replacement!r})" if self.replacement else ""
        return text + "".join(f".link({link!r})" for link in self.links) + _shown(self.errbacks)


@dataclass(frozen=True, kw_only=True)
class Chain(Shown):
    parts: "tuple[Canvas, ...]"
    errbacks: tuple[Step, ...] = ()

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.parts))}){_shown(self.errbacks)}"


@dataclass(frozen=True, kw_only=True)
class Group(Shown):
    parts: "tuple[Canvas, ...]"
    errbacks: tuple[Step, ...] = ()

    def __repr__(self) -> str:
        return f"group({', '.join(map(repr, self.parts))}){_shown(self.errbacks)}"


@dataclass(frozen=True, kw_only=True)
class Chord(Shown):
    """The last part is the body."""

    parts: "tuple[Canvas, ...]"
    errbacks: tuple[Step, ...] = ()

    def __repr__(self) -> str:
        *header, body = map(repr, self.parts)
        return f"chord([{', '.join(header)}], {body}){_shown(self.errbacks)}"


Canvas = Step | Chain | Group | Chord
_SHAPES = {shape.__name__: shape for shape in (Step, Chain, Group, Chord)}


def _shown(errbacks: tuple[Step, ...]) -> str:
    return "".join(f".link_error({errback.role} {errback!r})" for errback in errbacks)


# -- As JSON, for what replaces a task travels in its message


def to_json(canvas: Canvas) -> dict[str, Any]:
    """Return *canvas* as JSON types."""
    return json.loads(json.dumps(_tagged(canvas)))


def _tagged(value: Any) -> Any:
    if isinstance(value, Canvas):
        fields = {name: _tagged(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"shape": type(value).__name__, **fields}
    return [_tagged(item) for item in value] if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """Return what `to_json` was given."""
    if isinstance(value, Mapping):
        fields = {name: from_json(item) for name, item in value.items() if name != "shape"}
        return _SHAPES[value["shape"]](**fields)
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


# -- As Celery writes it


def signature(canvas: Canvas, app: Any) -> Any:
    """Return *canvas* as a signature of the tasks of *app*."""
    if isinstance(canvas, Step):
        bare = replace(canvas, links=(), errbacks=())
        task = app.tasks[task_name(canvas)]
        written = task.signature(kwargs={"spec": to_json(bare)}, immutable=canvas.is_immutable)
        for link in canvas.links:
            written.link(signature(link, app))
    else:
        parts = [signature(part, app) for part in canvas.parts]
        match canvas:
            case Chain():
                written = chain(*parts)
            case Group():
                written = group(parts)
            case Chord():
                written = chord(parts[:-1], parts[-1])
    for errback in canvas.errbacks:
        written.link_error(signature(errback, app))
    return written


def task_name(step: Step) -> str:
    """Return the name of the task of *step*: plain and MCP tasks, each kind for each way to be called."""
    way = "called_back" if step.role == "called back" else "auto_step" if step.is_auto else "step"
    return f"{'mcp' if step.is_mcp else 'plain'}.{way}"


# -- The flow of sessions


@dataclass
class Flow:
    """Which steps the sessions of a step should come from.

    A state is the labels of MCP steps: for each server, the session comes from the first of them that has one.
    """

    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Label of an errback to the state in which what it was linked to begins.
    errbacks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Label of an errback to the labels of all steps in what it was linked to.
    linked: dict[str, set[str]] = field(default_factory=dict)
    #: Labels of the errbacks that are sure to get it where what they were linked to never begins.
    counted: set[str] = field(default_factory=set)
    #: Label of a step to the label of the step that it replaces, or is a part of what replaces it.
    replaces: dict[str, str] = field(default_factory=dict)
    is_mcp: dict[str, bool] = field(default_factory=dict)

    def through(self, canvas: Canvas, state: tuple[str, ...] = (), host: str | None = None) -> tuple[str, ...]:
        """Note what *canvas* gets when it begins in *state*, and return the state of what comes after it."""
        match canvas:
            case Step():
                after = self._through_step(canvas, state, host)
            case Chain():
                after = state
                for part in canvas.parts:
                    after = self.through(part, after, host)
            case Group():
                # Branches do not merge.
                after = state
                for part in canvas.parts:
                    self.through(part, state, host)
            case Chord():
                *header, body = canvas.parts
                for part in header:
                    self.through(part, state, host)
                after = self.through(body, state, host)
        for errback in canvas.errbacks:
            self.errbacks[errback.label] = state
            self.linked[errback.label] = {step.label for step in steps_of(canvas)}
            self.counted |= {errback.label} if _counts_errbacks(canvas) else set()
            # What it gets depends on which task has failed; what is linked to it gets it from there.
            self.through(replace(errback, errbacks=()), state, host)
        return after

    def _through_step(self, step: Step, state: tuple[str, ...], host: str | None) -> tuple[str, ...]:
        self.before[step.label] = state
        self.is_mcp[step.label] = step.is_mcp
        if host is not None:
            self.replaces[step.label] = host
        # An errback passes on what it gets from the task that has failed, whichever that is, even if it is a plain one.
        after = (step.label,) if step.is_mcp or step.role != "step" else state
        if step.replacement is not None:
            # A plain task passes nothing on. What was bound past it stays; the rest comes from what replaces it.
            replaced = self.through(step.replacement, after if step.is_mcp else (), step.label)
            after = replaced if step.is_mcp else (*after, *replaced)
        for link in step.links:
            self.through(link, after, host)
        return after


def _counts_errbacks(canvas: Canvas) -> bool:
    """Whether the errbacks of *canvas*, the body of a chord, are counted when the header fails.

    Those of a plain task are not: nothing was bound to it. Those of a chain are the errbacks of each of its steps only
    when it is published, which may be after they were looked for.
    """
    match canvas:
        case Step():
            return canvas.is_mcp
        case Chain():
            return False
        case Group():
            return all(map(_counts_errbacks, canvas.parts))
        case Chord():
            return _counts_errbacks(canvas.parts[-1])


def steps_of(canvas: Canvas) -> Iterator[Step]:
    """Return all steps of *canvas*, with its errbacks, links and replacements."""
    if isinstance(canvas, Step):
        yield canvas
        for part in (*canvas.links, *([canvas.replacement] if canvas.replacement else ())):
            yield from steps_of(part)
    else:
        for part in canvas.parts:
            yield from steps_of(part)
    for errback in canvas.errbacks:
        yield from steps_of(errback)


# -- At random


def _labelled(canvas: Canvas, numbers: Iterator[int]) -> Canvas:
    if not isinstance(canvas, Step):
        parts = tuple(_labelled(part, numbers) for part in canvas.parts)
        return replace(canvas, parts=parts, errbacks=tuple(_labelled(errback, numbers) for errback in canvas.errbacks))
    return replace(
        canvas,
        label=f"{'m' if canvas.is_mcp else 'p'}{next(numbers)}",
        replacement=canvas.replacement and _labelled(canvas.replacement, numbers),
        links=tuple(_labelled(link, numbers) for link in canvas.links),
        errbacks=tuple(_labelled(errback, numbers) for errback in canvas.errbacks),
    )


@st.composite
def canvases(draw: st.DrawFn, most: int = 40, shapes: st.SearchStrategy[Canvas] | None = None) -> Canvas:
    """Canvases of up to *most* tasks, errbacks and replacements among them; of these *shapes*, or of any."""
    canvas = _labelled(draw(_parts(3) if shapes is None else shapes), count(1))
    assume(sum(1 for _ in steps_of(canvas)) <= most)
    return canvas


@cache
def _parts(depth: int) -> st.SearchStrategy[Canvas]:
    if not depth:
        return _steps("step")
    composites = [_composites(shape, depth - 1) for shape in (Chain, Chain, Chord, Group)]
    # Deferred, so that its repr is short.
    return st.deferred(lambda: st.one_of(_steps("step", depth - 1), *composites))


@cache
def _composites(shape: type[Canvas], depth: int) -> st.SearchStrategy[Canvas]:
    parts = st.lists(_parts(depth), min_size=2, max_size=5)
    return st.builds(shape, parts=parts.map(tuple), errbacks=_rarely(_errbacks(0)))


def _rarely(items: st.SearchStrategy[Canvas]) -> st.SearchStrategy[tuple[Canvas, ...]]:
    """Mostly nothing."""
    return st.integers(0, 5).flatmap(lambda size: st.tuples(*[items] * max(0, size - 3)))


_USES = st.sampled_from(((), ("one",), ("two",), SERVERS))
_ENDS = st.sampled_from(("returns",) * 12 + ("raises",) * 3 + ("ignores", "rejects", "requeues"))
_RETRIES = st.sampled_from((0,) * 6 + (1, MAX_RETRIES, MAX_RETRIES + 1))


@cache
def _steps(role: str, depth: int | None = None) -> st.SearchStrategy[Step]:
    """Steps; with a depth, also such with links, errbacks and replacements."""
    more: dict[str, st.SearchStrategy[Any]] = {}
    if depth is not None:
        more = {"links": _rarely(_parts(depth)), "replacement": st.one_of(*[st.none()] * 3, _parts(depth))}
    if role == "step":
        more["errbacks"] = _rarely(_errbacks(0 if depth is None else depth))
    fields = {"is_immutable": st.booleans(), "retries": _RETRIES, "is_auto": st.booleans(), "end": _ENDS}
    plain = st.builds(Step, role=st.just(role), **fields, **more)
    uses = {"at_start": _USES, "at_end": _USES}
    mcp = st.builds(Step, role=st.just(role), is_mcp=st.just(True), **uses, **fields, **more)
    return st.deferred(lambda: st.one_of(plain, mcp))


@cache
def _errbacks(depth: int) -> st.SearchStrategy[Step]:
    # Celery calls it as a function where its task has failed, if it is not immutable. It never looks at its links.
    called_back = st.builds(Step, role=st.just("called back"), is_mcp=st.booleans(), at_start=_USES, at_end=_USES)
    called = _steps("errback", depth or None)
    return st.deferred(lambda: st.one_of(called, called_back))


# -- Shapes in which certain faults show


def _opener(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    """Steps that open a session and succeed."""
    return st.builds(Step, is_mcp=st.just(True), at_start=st.sampled_from((("one",), SERVERS)), **fields)


def with_links() -> st.SearchStrategy[Canvas]:
    """A task with several links, which pass its session on."""
    return _opener(links=st.lists(_steps("step"), min_size=2, max_size=3).map(tuple))


def in_turn() -> st.SearchStrategy[Canvas]:
    """A chain of tasks, each of which may fail."""
    rest = st.lists(_steps("step"), min_size=2, max_size=4)
    return st.builds(lambda opener, parts: Chain(parts=(opener, *parts)), _opener(), rest)


def with_a_chord() -> st.SearchStrategy[Canvas]:
    """A chord behind a task that opens a session."""
    header = st.lists(_steps("step"), min_size=2, max_size=3)
    parts = st.builds(lambda header, body: Chord(parts=(*header, body)), header, _steps("step"))
    return st.builds(lambda opener, then: Chain(parts=(opener, then)), _opener(), parts)


def in_branches() -> st.SearchStrategy[Canvas]:
    """A group behind a task that opens a session, the last of whose members ends it."""
    parts = st.lists(_opener(), min_size=2, max_size=3).map(lambda parts: Group(parts=tuple(parts)))
    return st.builds(lambda opener, then: Chain(parts=(opener, then)), _opener(), parts)


def with_a_retry() -> st.SearchStrategy[Canvas]:
    """A task that is retried in a session of the one before it."""
    retried = _opener(retries=st.just(1), is_auto=st.booleans())
    return st.tuples(_opener(), retried).map(lambda parts: Chain(parts=parts))


def with_errbacks() -> st.SearchStrategy[Canvas]:
    """A task that fails in a session of the one before it, with errbacks that get that as well."""
    errbacks = st.lists(_opener(role=st.just("errback")), min_size=1, max_size=2).map(tuple)
    failing = _opener(end=st.just("raises"), errbacks=errbacks)
    return st.tuples(_opener(), failing).map(lambda parts: Chain(parts=parts))


def past_a_failure() -> st.SearchStrategy[Canvas]:
    """A plain task that fails, between tasks that share a session, with an errback that gets that as well."""
    errback = _opener(role=st.just("errback"))
    failing = st.builds(Step, end=st.just("raises"), errbacks=st.tuples(errback))
    return st.tuples(_opener(), failing, _opener()).map(lambda parts: Chain(parts=parts))
