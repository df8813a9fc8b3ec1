"""`celery -A proj mcp ...`: the sessions of an app's workflows and the servers that it uses, for people and scripts.

Loaded with every `celery` command. What takes long to load, the MCP SDK above all, waits for a command that needs it.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from celery.bin.base import handle_preload_options

from . import bootstep as _bootstep  # noqa: F401 - has `celery inspect` know mcp_sessions
from .display import (
    CHECK_HEADER,
    HISTORY_HEADER,
    NAMED_HOLDERS,
    SERVER_HEADER,
    SESSION_HEADER,
    check_json,
    check_row,
    history_rows,
    server_json,
    server_row,
    session_facts,
    session_json,
    session_row,
)
from .exceptions import ConfigurationError, MCPCeleryError, StoreError, TransportError
from .handle import SessionHandle
from .history import History
from .known_tasks import servers_of, usable_servers_of
from .redis_store import HISTORY_LENGTH, get_store
from .settings import ServerSettings, places, server_settings

if TYPE_CHECKING:
    from mcp_types import CallToolResult

    from .check import Check
    from .store import SessionRecord, Store

#: Sessions that `close` ends at once.
AT_ONCE = 16

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Commands(click.Group):
    """A group whose commands tell in one sentence what went wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreError as exc:
            named = "mcp_store_url, or else of result_backend or broker_url,"
            raise click.ClickException(f"{exc}: check that the Redis of {named} can be reached from here") from exc
        except MCPCeleryError as exc:
            raise click.ClickException(str(exc)) from exc


@click.group(cls=_Commands)
@click.pass_context
@handle_preload_options
def mcp(ctx: click.Context, **_: Any) -> None:
    """MCP sessions of workflows, and MCP servers."""


_as_json = click.option("-j", "--json", "as_json", is_flag=True, help="Use json as output format.")


# -- What is read from the command line


def _read_time(_ctx: click.Context, _param: click.Parameter, text: str | None) -> float | None:
    found = re.fullmatch(r"(\d+)([smhd])", text or "")
    if found is None and text is not None:
        raise click.BadParameter("a time is a number and one of s, m, h and d, such as 90s, 30m, 2h or 1d")
    return None if found is None else float(found[1]) * _UNIT_SECONDS[found[2]]


def _read_arguments(_ctx: click.Context, _param: click.Parameter, text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as exc:
        raise click.BadParameter(f'this is not JSON ({exc}); write it such as \'{{"query": "mcp"}}\'') from exc
    if not isinstance(arguments, dict):
        raise click.BadParameter('arguments are a JSON object, such as \'{"query": "mcp"}\'')
    return arguments


def _read_handle(_ctx: click.Context, _param: click.Parameter, text: str | None) -> SessionHandle | None:
    if text is None:
        return None
    return SessionHandle.load(sys.stdin.read() if text == "-" else text)


# -- Sessions


@mcp.command()
@click.option("--ended", is_flag=True, help="Those that have ended, as long as their history is kept.")
@_as_json
@click.pass_obj
def sessions(obj: Any, ended: bool, as_json: bool) -> None:
    """List sessions.

    Those that have not ended, the next deadline first. Each goes by a hash of its ID.
    """
    records = list(_store(obj).sessions(ended=ended))
    if as_json:
        _print_json(obj, [session_json(record) for record in records])
    elif records:
        _print_table(obj, SESSION_HEADER, [session_row(record) for record in records])
    else:
        obj.echo("There are no sessions" + (" that have ended, or their history is not kept." if ended else "."))


@mcp.command()
@click.argument("digits", metavar="HASH")
@click.option(
    "--html",
    "path",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write it as a picture for a browser to this file; - is standard output.",
)
@_as_json
@click.pass_obj
def show(obj: Any, digits: str, path: str | None, as_json: bool) -> None:
    """Show the history of a session.

    HASH is what `sessions` shows, or the first digits of it.
    """
    if path == "-" and as_json:
        raise click.UsageError("Only one of --json and --html - can go to standard output.")
    store = _store(obj)
    record = _find(store, digits)
    events = store.history(record.key)
    if path is not None:
        from .timeline import render  # noqa: PLC0415 - every celery command loads this module

        _write(path, render(record, session_facts(record), events))
    if as_json:
        _print_json(obj, {**session_json(record), "events": events})
    elif path is None:
        _print_history(obj, record, events)
    elif path != "-":
        obj.echo(f"Written to {path}.")


@mcp.command()
@click.argument("hashes", metavar="[HASH]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="All of them.")
@click.option(
    "--older-than",
    metavar="TIME",
    callback=_read_time,
    help="Those that have been idle for so long, as `sessions` shows it: 90s, 30m, 2h, 1d.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask before all are ended.")
@_as_json
@click.pass_obj
def close(obj: Any, *, hashes: Sequence[str], is_all: bool, older_than: float | None, yes: bool, as_json: bool) -> None:
    """End sessions at their servers.

    Whoever holds them: tasks that go on to use such a session fail with SessionLostError.
    """
    if sum([bool(hashes), is_all, older_than is not None]) != 1:
        raise click.UsageError("Say which sessions: one HASH or more, --older-than TIME, or --all.")
    store = _store(obj)
    if hashes:
        records = list({record.key: record for record in (_find(store, digits) for digits in hashes)}.values())
    else:
        unused_since = time.time() - (older_than or 0)
        records = [record for record in store.sessions() if is_all or record.used_at <= unused_since]
    if is_all and records and not yes:
        click.confirm(f"End {_count(records, 'session')}, also those in use?", abort=True, err=True)
    outcomes = _close(obj, store, records)
    found = {
        how: [record for record in records if outcomes[record.key] == how] for how in ("closed", "ended", "failed")
    }
    if as_json:
        _print_json(obj, {how: [record.short_id for record in those] for how, those in found.items()})
    else:
        for record in found["ended"]:
            obj.echo(f"Session {record.short_id} of {record.server} has ended already.")
        obj.echo(f"Closed {_count(found['closed'], 'session')}.")
    if found["failed"]:
        names = ", ".join(f"{record.short_id} ({record.server})" for record in found["failed"])
        raise click.ClickException(f"Not closed; workers try these again in a minute: {names}")


def _close(obj: Any, store: "Store", records: Sequence["SessionRecord"]) -> dict[str, str]:
    """End sessions and return, by key, what became of each: "closed", "ended" before that, or "failed"."""
    import anyio  # noqa: PLC0415 - as above

    from .reaper import Reaper  # noqa: PLC0415 - as above

    outcomes: dict[str, str] = {}
    store_errors: list[StoreError] = []

    async def close_one(reaper: Reaper, record: "SessionRecord", slots: anyio.Semaphore) -> None:
        async with slots:
            try:
                parked = store.take(record.key)
                if parked is None:
                    outcomes[record.key] = "ended"
                else:
                    is_closed = await reaper.close(parked, by="command", why="asked")
                    outcomes[record.key] = "closed" if is_closed else "failed"
            except StoreError as exc:
                store_errors.append(exc)

    async def close_all() -> None:
        reaper, slots = Reaper(store, _usable_servers(obj)), anyio.Semaphore(AT_ONCE)
        try:
            async with anyio.create_task_group() as tasks:
                for record in records:
                    tasks.start_soon(close_one, reaper, record, slots)
        finally:
            await reaper.aclose()

    anyio.run(close_all)
    if store_errors:
        raise store_errors[0]
    return outcomes


@mcp.command()
@_as_json
@click.pass_obj
def reap(obj: Any, as_json: bool) -> None:
    """Do what the reaper of a worker does, once.

    It ends sessions past their deadline, and pings those that were idle for the time of their server. The exit status
    is 1 where that failed for any of them.
    """
    import anyio  # noqa: PLC0415 - as above

    from .reaper import Reaper, Swept  # noqa: PLC0415 - as above

    store, servers = _store(obj), _usable_servers(obj)
    store.has_due(places(servers))  # asked for the error: a sweep keeps it to itself

    async def sweep() -> Swept:
        reaper = Reaper(store, servers)
        try:
            return await reaper.sweep()
        finally:
            await reaper.aclose()

    counts = anyio.run(sweep)._asdict()
    if as_json:
        _print_json(obj, counts)
    else:
        obj.echo(", ".join(f"{outcome} {count}" for outcome, count in counts.items()))
    if counts["failed"]:
        raise click.ClickException(f"Neither ended nor pinged: {counts['failed']}; workers try these again")
    store.has_due(places(servers))  # again: a sweep that lost the store has ended early


# -- Servers


@mcp.command()
@click.option("--check", "is_check", is_flag=True, help="Connect to each of them.")
@_as_json
@click.pass_obj
def servers(obj: Any, is_check: bool, as_json: bool) -> None:
    """List MCP servers, or check them.

    Those of mcp_servers, and those that tasks name by URL.
    """
    obj.app.loader.import_default_modules()
    known = servers_of(obj.app)
    checks = _check(known) if is_check else {}
    if as_json:
        checked = {name: check_json(check) for name, check in checks.items()}
        _print_json(obj, [server_json(name, known[name]) | checked.get(name, {}) for name in known])
    elif not known:
        obj.echo("There are no servers: mcp_servers is empty, and no task names a URL.")
    elif is_check:
        _print_table(obj, CHECK_HEADER, [check_row(check) for check in checks.values()])
    else:
        _print_table(obj, SERVER_HEADER, [server_row(name, settings) for name, settings in known.items()])
    unusable = [name for name, check in checks.items() if check.error is not None]
    if unusable:
        raise click.ClickException(f"{_count(unusable, 'server')} cannot be used: {', '.join(unusable)}")


def _check(known: Mapping[str, ServerSettings | ConfigurationError]) -> dict[str, "Check"]:
    import anyio  # noqa: PLC0415 - as above

    from .check import Check, check_all  # noqa: PLC0415 - as above

    usable = [settings for settings in known.values() if isinstance(settings, ServerSettings)]
    checks = {check.server: check for check in anyio.run(check_all, usable)}
    return {name: checks.get(name) or Check(server=name, error=str(known[name])) for name in known}


@mcp.command()
@click.argument("server")
@click.argument("tool")
@click.argument("arguments", metavar="[JSON]", callback=_read_arguments, default="{}")
@click.option(
    "--session",
    "handle",
    metavar="TEXT",
    callback=_read_handle,
    help="The handle of a session, as its dumps() gave it, to use and to leave open; - is standard input, where no "
    "other user can read it.",
)
@_as_json
@click.pass_obj
def call(
    obj: Any, *, server: str, tool: str, arguments: dict[str, Any], handle: SessionHandle | None, as_json: bool
) -> None:
    """Call a tool of a server.

    SERVER is a name in mcp_servers or a URL, JSON the arguments as an object. The session is opened for this one call.

    For example: celery -A proj mcp call web search '{"query": "mcp"}'
    """
    import anyio  # noqa: PLC0415 - as above
    from mcp import MCPError  # noqa: PLC0415 - as above

    settings = server_settings(obj.app.conf, server)
    try:
        result = anyio.run(_call_tool, settings, tool, arguments, handle)
    except MCPError as exc:
        raise click.ClickException(f"Server {settings.name!r} refused to call tool {tool!r}: {exc}") from exc
    content = "\n".join(_texts(result))
    if as_json:
        _print_json(obj, result.model_dump(mode="json", by_alias=True, exclude_none=True))
    elif not result.is_error:
        obj.echo(content)
    if result.is_error:
        raise click.ClickException(f"Tool {tool!r} of server {settings.name!r} failed: {content}")


async def _call_tool(
    settings: ServerSettings, tool: str, arguments: dict[str, Any], handle: SessionHandle | None
) -> "CallToolResult":
    from .connections import Connections  # noqa: PLC0415 - as above
    from .session import AsyncMCPSession  # noqa: PLC0415 - as above

    connections = Connections()
    session = AsyncMCPSession(settings, connections, handle)
    try:
        return await session.call_tool(tool, arguments, raise_on_error=False)
    finally:
        try:
            if handle is None:
                await session.close()
        except TransportError as exc:
            click.echo(f"The session is left to the idle timeout of its server: {exc}", err=True)
        await session.release()
        await connections.aclose()


def _texts(result: "CallToolResult") -> list[str]:
    """Return what a tool gave as texts: the structured content where there is nothing else."""
    if not result.content and result.structured_content is not None:
        return [json.dumps(result.structured_content)]
    return [block.text if block.type == "text" else f"[{block.type}; see --json]" for block in result.content]


# -- What the app has


def _store(obj: Any) -> "Store":
    store = get_store(obj.app.conf)
    if store is None:
        raise click.ClickException(
            "This app has no store of sessions: set mcp_store_url to the URL of a Redis, or use one as result backend "
            "or broker (is it the right app? celery -A proj mcp ...)"
        )
    return store


def _find(store: "Store", digits: str) -> "SessionRecord":
    """Return the session whose hash begins with *digits*. Errors do not repeat them: they may be a session ID."""
    found = store.find(digits.lower()) if re.fullmatch("[0-9a-fA-F]{1,32}", digits) else []
    if not found:
        raise click.ClickException(
            "There is no session with this hash: `celery mcp sessions` lists them, with --ended those that have ended"
        )
    if len(found) > 1:
        known = ", ".join(record.short_id for record in found[:NAMED_HOLDERS])
        more = ", ..." if len(found) > NAMED_HOLDERS else ""
        raise click.ClickException(f"{len(found)} sessions begin so: {known}{more}. Give more digits")
    return found[0]


def _usable_servers(obj: Any) -> dict[str, ServerSettings]:
    obj.app.loader.import_default_modules()
    return usable_servers_of(obj.app)


# -- Output


def _print_history(obj: Any, record: "SessionRecord", events: Sequence[Mapping[str, Any]]) -> None:
    for name, value in session_facts(record):
        obj.echo(f"{name + ':':<11}{value}")
    rows = list(history_rows(History.read(events)))
    if rows:
        obj.echo()
        if len(events) >= HISTORY_LENGTH:
            obj.echo("What happened earlier is not kept.")
        _print_table(obj, HISTORY_HEADER, rows)


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _print_json(obj: Any, value: object) -> None:
    obj.echo(json.dumps(value, indent=2))


def _print_table(obj: Any, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, without those that are empty in all rows."""
    columns = [(name, *cells) for name, cells in zip(header, zip(*rows, strict=True), strict=True) if any(cells)]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        obj.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _write(path: str, text: str) -> None:
    try:
        with click.open_file(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise click.FileError(path, exc.strerror) from exc
