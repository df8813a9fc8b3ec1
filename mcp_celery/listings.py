"""The tools that a server has listed, with their schemas, kept for all sessions of a process."""

import difflib
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

#: How long a listing serves.
LISTING_SECONDS = 300.0
#: Tools that are named where there is none of the name that was asked for: those like it, else others.
MAX_NEAR, LEAST_LIKENESS, MAX_NAMES = 5, 0.5, 20

#: Where a schema may name properties beside its `properties`.
_NAMES_ELSEWHERE = frozenset(
    {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties"}
)


class ToolListings:
    """What `tools/list` of one server last gave, page by page, so that a call costs one request.

    The output of a tool is checked by its listed schema (MCP 2025-11-25, Tools, Output Schema). A session object of the
    SDK would list the tools for that and compile the schema; sessions come and go with each task, and this stays. One
    for a server in a process.
    """

    def __init__(self) -> None:
        self._pages: dict[str | None, dict[str, Any]] = {}
        self._since = -math.inf
        self._unlisted: set[str] = set()
        self._validators: dict[str, Validator | None] = {}

    def get(self, cursor: str | None) -> dict[str, Any] | None:
        """Return the page at *cursor*, or None where it is not known or too old."""
        if time.monotonic() - self._since > LISTING_SECONDS:
            self.drop()
        return self._pages.get(cursor)

    def put(self, cursor: str | None, page: dict[str, Any]) -> None:
        """Keep a page; the first one starts the listing anew."""
        if cursor is None:
            self.forget_pages()
        self._pages[cursor] = page

    def drop(self) -> None:
        """Forget the listing, for instance because the server said that it changed."""
        self._pages.clear()
        self._unlisted.clear()
        self._validators.clear()

    def lacks(self, tool: str) -> bool:
        """Whether *tool* is not in the listing, and was not looked for in vain since all was forgotten."""
        self.get(None)  # forgets what is too old
        return self._entry(tool) is None and tool not in self._unlisted

    def forget_pages(self) -> None:
        """Have the tools listed anew, without forgetting which ones were looked for in vain."""
        self._pages.clear()
        self._validators.clear()
        self._since = time.monotonic()

    def note_if_unlisted(self, tool: str) -> None:
        """Note whether the server lists *tool*, so that one which it does not is not looked for at every call."""
        if self._entry(tool) is None:
            self._unlisted.add(tool)

    def problem_with(self, tool: str, structured_content: object) -> str | None:
        """Return what is wrong with the output of *tool* by its listed output schema, or None.

        None as well where it has no schema, or one that is none.
        """
        entry = self._entry(tool)
        schema = entry.get("outputSchema") if entry is not None else None
        if not isinstance(schema, Mapping):
            return None
        if structured_content is None:
            return "it has an output schema and gave no structured content"
        if tool not in self._validators:
            self._validators[tool] = _compiled(schema)
        validator = self._validators[tool]
        try:
            error = None if validator is None else best_match(validator.iter_errors(structured_content))
        except Unresolvable:
            return None
        return None if error is None else f"its structured content does not fit its output schema: {error.message}"

    def entries(self) -> list[dict[str, Any]]:
        """Return what is known of the tools, and not too old."""
        self.get(None)  # forgets what is too old
        return [entry for page in self._pages.values() for entry in page.get("tools", ())]

    def _entry(self, tool: str) -> dict[str, Any] | None:
        entries = (entry for page in self._pages.values() for entry in page.get("tools", ()))
        return _named(entries, tool)


def problem_with_arguments(
    entries: Iterable[Mapping[str, Any]], tool: str, arguments: Mapping[str, object]
) -> str | None:
    """Return what is wrong with a call of *tool* by its input schema, or None. Looks at names, and not at values.

    Args:
        entries: The tools of the server, as `tools/list` has them.
        tool: The name of the tool.
        arguments: Those of the call.
    """
    known = list(entries)
    entry = _named(known, tool)
    if entry is None:
        names = [str(other.get("name")) for other in known]
        near = difflib.get_close_matches(tool, names, MAX_NEAR, LEAST_LIKENESS) or sorted(names)[:MAX_NAMES]
        return f"there is no tool {tool!r}; there are, for instance, {_listed(near)}"
    schema = entry.get("inputSchema")
    if not isinstance(schema, Mapping):
        return None
    # Null in the place of a list would be a bad schema, which is for its server to answer for.
    taken, required = schema.get("properties") or {}, schema.get("required") or []
    unknown = [] if _takes_others(schema) else [name for name in arguments if name not in taken]
    lacking = [name for name in required if name not in arguments]
    if not (unknown or lacking):
        return None
    said = [
        f"takes no argument {_listed(unknown)}" if unknown else "",
        f"needs {_listed(lacking)}" if lacking else "",
    ]
    optional = [name for name in taken if name not in required]
    all_of_it = f"{_listed(required)}; optional: {_listed(optional)}" if optional else _listed(required)
    return f"tool {tool!r} {' and '.join(filter(None, said))}. Its arguments: {all_of_it}"


def _takes_others(schema: Mapping[str, Any]) -> bool:
    """Whether there may be arguments that *schema* does not name in its properties.

    By JSON Schema there always may, unless it says otherwise; but a name that it does not list is a slip far more often
    than an argument. One without any properties takes all (MCP 2025-11-25, Tools, Tool).
    """
    if "additionalProperties" in schema and "patternProperties" not in schema:
        return schema["additionalProperties"] is not False
    return "properties" not in schema or not _NAMES_ELSEWHERE.isdisjoint(schema)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "none"


def _named(entries: Iterable[Mapping[str, Any]], tool: str) -> dict[str, Any] | None:
    return next((dict(entry) for entry in entries if entry.get("name") == tool), None)


def _compiled(schema: Mapping[str, Any]) -> Validator | None:
    """Return the validator of an output schema, which takes far longer to make than to use; None for a bad schema."""
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError:
        return None
    # An empty registry: a `$ref` may lead within the schema and nowhere else.
    return kind(schema, registry=Registry())
