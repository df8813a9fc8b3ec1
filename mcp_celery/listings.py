"""The tools that a server has listed and the schemas of their output, kept for all sessions of a process."""

import math
import time
from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

#: How long a listing serves.
LISTING_SECONDS = 300.0


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

    def _entry(self, tool: str) -> dict[str, Any] | None:
        entries = (entry for page in self._pages.values() for entry in page.get("tools", ()))
        return next((entry for entry in entries if entry.get("name") == tool), None)


def _compiled(schema: Mapping[str, Any]) -> Validator | None:
    """Return the validator of an output schema, which takes far longer to make than to use; None for a bad schema."""
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError:
        return None
    # An empty registry: a `$ref` may lead within the schema and nowhere else.
    return kind(schema, registry=Registry())
