"""Records on a terminal: rich tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from registry.deliveries import Delivery, EndpointState
from registry.events import Event
from registry.records import DIGEST_PREFIX, AliasMove, Scene, Version
from registry.transfer import Transfer

_SAID = ("at", "by", "scene")
SHOWN_DIGITS = 12
# Long values, such as a training report, are left to `--json`.
SHOWN_LENGTH = 200


def print_json(thing: Any) -> None:
    """Records, or lists of them, as indented JSON; times in ISO 8601."""
    click.echo(json.dumps(_plain(thing), indent=2, ensure_ascii=False))


def print_done(version: Version, as_json: bool, said: str) -> None:
    """What a command did to a version, in one line."""
    if as_json:
        print_json(version)
        return
    names = f", aliases: {', '.join(version.aliases)}" if version.aliases else ""
    click.echo(f"{said} {version.reference} ({DIGEST_PREFIX}{version.digest}{names}).")


def print_scenes(scenes: Sequence[Scene]) -> None:
    """Scenes as a table."""
    table = _table("scene", "versions", "latest", "aliases", "created")
    for scene in scenes:
        pointers = ", ".join(f"{name} {number}" for name, number in scene.aliases.items())
        counts = (str(scene.versions), str(scene.latest))
        table.add_row(scene.name, *counts, pointers, _time(scene.created))
    _show(table, "No scenes yet: publish a capsule with `registry publish FILE`.")


def print_versions(versions: Sequence[Version]) -> None:
    """Versions as a table."""
    table = _table("version", "aliases", "digest", "base", "rank", "size", "created", "by")
    for version in versions:
        table.add_row(
            version.reference,
            ", ".join(version.aliases) or ("retired" if version.retired else ""),
            version.digest[:SHOWN_DIGITS],
            version.base,
            str(version.rank),
            _size(version.size_bytes),
            _time(version.created),
            version.created_by,
        )
    _show(table, "No versions to show: retired ones appear with --retired.")


def print_version(version: Version) -> None:
    """One version as a table of its fields and metadata."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    fields = _plain(version)
    metadata = fields.pop("metadata")
    fields["aliases"] = ", ".join(version.aliases) or "none"
    fields["retired"] = fields["retired"] or "no"
    for name, value in {**fields, **metadata}.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}... (see --json)"
        table.add_row(name, shown)
    Console(markup=False, highlight=False).print(table)


def print_moves(moves: Sequence[AliasMove]) -> None:
    """Moves of aliases as a table, oldest first."""
    table = _table("moved", "alias", "from", "to", "action", "by")
    for move in moves:
        steps = (str(move.previous or "-"), str(move.number))
        table.add_row(_time(move.moved), move.alias, *steps, move.action, move.moved_by)
    _show(table, "No alias of this name was ever set.")


def print_transfers(transfers: Sequence[Transfer]) -> None:
    """What became of each scene, as a table."""
    table = _table("scene", "versions", "moves", "sent")
    for one in transfers:
        counts = (str(one.versions), str(one.moves))
        table.add_row(one.scene, *counts, _size(one.sent_bytes))
    _show(table, "No scenes.")


def event_line(event: Event) -> str:
    """An event in one line."""
    details = {key: value for key, value in event.data.items() if key not in _SAID}
    said = " ".join(f"{key}={json.dumps(value)}" for key, value in details.items())
    head = f"{event.id} {_time(event.created)} {event.kind} {event.data.get('scene', '')}"
    return f"{head} by {event.data.get('by', '')} {said}".rstrip()


def delivery_line(delivery: Delivery) -> str:
    """What became of an event, in one line."""
    head = f"{delivery.event.id} {delivery.event.kind}"
    if delivery.failure is None:
        return f"{head} delivered to {delivery.endpoint}"
    later = f"again at {_time(delivery.due)}" if delivery.due else "given up"
    return f"{head} {later}: {delivery.endpoint}: {delivery.failure}"


def print_endpoints(states: Sequence[EndpointState]) -> None:
    """How far each endpoint came, as a table."""
    table = _table("endpoint", "delivered", "waiting", "given up", "last failure")
    for state in states:
        counts = (str(state.delivered), str(state.waiting), str(state.given_up))
        table.add_row(state.endpoint or "(first to be named)", *counts, state.failure or "")
    _show(table, "No endpoints yet: name one with `registry deliver URL`.")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "digest")
    return table


def _show(table: Table, nothing: str) -> None:
    if table.row_count:
        Console(markup=False, highlight=False).print(table)
    else:
        click.echo(nothing)


def _plain(thing: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON knows them."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        names = [field.name for field in dataclasses.fields(thing)]
        return {name: _plain(getattr(thing, name)) for name in names}
    if isinstance(thing, datetime):
        return thing.isoformat()
    if isinstance(thing, Mapping):
        return {str(key): _plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_plain(value) for value in thing]
    return thing


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
