"""The `registry` commands: tables for people, `--json` for programs.

Exit status 0 when done, 1 when `verify` found faults, 2 with one sentence on an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from registry import tables
from registry.errors import InvalidReference, RegistryError
from registry.records import LIVE, Reference, Version
from registry.registry import DATABASE_VARIABLE, DEFAULT_PLACE, PLACE_VARIABLE, Registry


class Refused(click.ClickException):
    """One sentence on standard error, and exit status 2."""

    exit_code = 2


class RegistryGroup(click.Group):
    """Turns the registry's errors into one sentence and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and let `--help` and usage errors be click's own."""
        try:
            return super().invoke(ctx)
        except RegistryError as error:
            raise Refused(str(error)) from error


@dataclass(frozen=True)
class Address:
    """Where the commands find the registry; it is opened by the command, after its checks."""

    place: str
    database: str | None

    def open(self, *, create: bool = False) -> Registry:
        """The registry; only publishing creates one."""
        return Registry.open(self.place, database=self.database, create=create)


@click.group(cls=RegistryGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--registry",
    "place",
    envvar=PLACE_VARIABLE,
    default=DEFAULT_PLACE,
    show_default=True,
    show_envvar=True,
    metavar="PLACE",
    help="Directory, or s3://bucket/prefix with --database.",
)
@click.option(
    "--database",
    envvar=DATABASE_VARIABLE,
    show_envvar=True,
    metavar="URL",
    help="Database of the metadata; without it a file in the directory.",
)
@click.pass_context
def cli(ctx: click.Context, place: str, database: str | None) -> None:
    """Keep, name and hand out scene adapters.

    Every capsule that is published becomes a numbered version of its scene and never changes.
    Aliases are names that move between versions; the service answers with the one called "live".

    \b
    A REFERENCE names a version:
      tower             the version that "live" points to
      tower@candidate   the version that another alias points to
      tower@3           version 3
      sha256:1f0c...    the version with these bytes (all 64 digits)

    \b
    A first round:
      registry publish tower.safetensors
      registry list
      registry publish better.safetensors --alias candidate
      registry promote tower@candidate
      registry rollback tower
    """
    ctx.obj = Address(place, database)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")(command)


def by_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--by` to a command."""
    return click.option("--by", metavar="NAME", help="Who does this; the login name by default.")(
        command
    )


def retired_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--retired` to a command."""
    return click.option("--retired", is_flag=True, help="Show retired versions too.")(command)


@cli.command("list")
@click.argument("scene", required=False)
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.option("--after", default="", metavar="NAME", help="Scenes that follow this name.")
@click.option("--before", type=click.IntRange(1), metavar="N", help="Versions below this number.")
@retired_option
@json_option
@click.pass_obj
def list_command(
    address: Address,
    scene: str | None,
    limit: int,
    after: str,
    before: int | None,
    retired: bool,
    as_json: bool,
) -> None:
    """List the scenes, or the versions of one SCENE, newest first."""
    registry = address.open()
    if scene is None:
        scenes = registry.scenes(after=after, limit=limit)
        tables.print_json(scenes) if as_json else tables.print_scenes(scenes)
    else:
        versions = registry.versions(scene, before=before, limit=limit, retired=retired)
        tables.print_json(versions) if as_json else tables.print_versions(versions)


@cli.command()
@click.argument("reference")
@json_option
@click.pass_obj
def show(address: Address, reference: str, as_json: bool) -> None:
    """Show everything about the version that REFERENCE names."""
    version = address.open().resolve(reference)
    tables.print_json(version) if as_json else tables.print_version(version)


@cli.command()
@click.argument("capsule", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--scene", metavar="NAME", help="Scene to publish under; the capsule's by default.")
@click.option("--alias", default=LIVE, show_default=True, help="Alias to move to the version.")
@click.option("--no-alias", is_flag=True, help="Move no alias; only give a number.")
@by_option
@json_option
@click.pass_obj
def publish(
    address: Address,
    capsule: Path,
    scene: str | None,
    alias: str,
    no_alias: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Add the file CAPSULE as its scene's next version, and make it live.

    The registry is created when it is not there. Publishing the same bytes again gives the
    version they already have.
    """
    try:
        data = capsule.read_bytes()
    except OSError as error:
        raise Refused(
            f"{capsule} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    registry = address.open(create=True)
    version = registry.publish(data, scene=scene, alias=None if no_alias else alias, by=by)
    tables.print_done(version, as_json, "Published")


@cli.command()
@click.argument("reference")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
@click.pass_obj
def fetch(address: Address, reference: str, file: Path, as_json: bool) -> None:
    """Write the capsule that REFERENCE names to FILE, after checking its bytes."""
    registry = address.open()
    version = registry.resolve(reference)
    data = registry.fetch(f"sha256:{version.digest}")
    # Beside its place first, so that no half of a file ever bears the name.
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Refused(f"{file} cannot be written: {error.strerror}. Name another file.") from error
    tables.print_done(version, as_json, f"Wrote {file} from")


@cli.command()
@click.argument("scene")
@click.argument("alias")
@click.argument("number", type=click.IntRange(1))
@click.option(
    "--expect",
    type=click.IntRange(0),
    metavar="N",
    help="Refuse unless the alias points to N now; 0: unless there is no such alias.",
)
@by_option
@json_option
@click.pass_obj
def alias(
    address: Address,
    scene: str,
    alias: str,
    number: int,
    expect: int | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Point ALIAS of SCENE to the version NUMBER."""
    version = address.open().set_alias(scene, alias, number, expect=expect, by=by)
    tables.print_done(version, as_json, f"{alias} is now")


@cli.command()
@click.argument("reference")
@click.option("--to", default=LIVE, show_default=True, metavar="ALIAS", help="Alias to move.")
@click.option("--expect", type=click.IntRange(0), metavar="N", help="As in `registry alias`.")
@by_option
@json_option
@click.pass_obj
def promote(
    address: Address, reference: str, to: str, expect: int | None, by: str | None, as_json: bool
) -> None:
    """Make the version that REFERENCE names live, for instance tower@candidate."""
    version = address.open().promote(reference, to=to, expect=expect, by=by)
    tables.print_done(version, as_json, f"{to} is now")


@cli.command()
@click.argument("scene")
@click.option("--alias", default=LIVE, show_default=True, help="Alias to move back.")
@by_option
@json_option
@click.pass_obj
def rollback(address: Address, scene: str, alias: str, by: str | None, as_json: bool) -> None:
    """Point an alias of SCENE back to the version it left; again goes further back."""
    version = address.open().rollback(scene, alias, by=by)
    tables.print_done(version, as_json, f"{alias} is back at")


@cli.command()
@click.argument("reference")
@by_option
@json_option
@click.pass_obj
def retire(address: Address, reference: str, by: str | None, as_json: bool) -> None:
    """Hide the version REFERENCE, such as tower@3; its bytes are kept.

    A version that an alias points to is refused: move the alias first.
    """
    version = address.open().retire(*_numbered(reference), by=by)
    tables.print_done(version, as_json, "Retired")


@cli.command()
@click.argument("reference")
@by_option
@json_option
@click.pass_obj
def restore(address: Address, reference: str, by: str | None, as_json: bool) -> None:
    """Bring back the retired version REFERENCE, such as tower@3."""
    version = address.open().restore(*_numbered(reference), by=by)
    tables.print_done(version, as_json, "Restored")


@cli.command()
@click.argument("scene")
@click.option("--alias", help="Only the moves of this alias.")
@json_option
@click.pass_obj
def history(address: Address, scene: str, alias: str | None, as_json: bool) -> None:
    """Show every move of the aliases of SCENE: when, from where, to where, by whom."""
    moves = address.open().history(scene, alias)
    tables.print_json(moves) if as_json else tables.print_moves(moves)


@cli.command()
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Read every capsule and compare it with its digest and its row.

    Exit status 1 when something is wrong. Nothing is changed.
    """
    registry = ctx.obj.open()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("Reading", total=None)
        count = 0

        def step(version: Version) -> None:
            nonlocal count
            count += 1
            progress.update(task, description=f"Read {count} versions, last {version.reference}")

        faults = registry.verify(step)
    if as_json:
        tables.print_json({"versions": count, "faults": faults})
    else:
        for fault in faults:
            click.echo(f"{fault.thing}: {fault.message}")
        click.echo(f"Read {count} versions, found {len(faults)} faults.")
    ctx.exit(1 if faults else 0)


@cli.command()
@json_option
@click.pass_obj
def upgrade(address: Address, as_json: bool) -> None:
    """Bring the database of an older registry to the tables of this one."""
    revision = Registry.upgrade(address.place, database=address.database)
    if as_json:
        tables.print_json({"revision": revision})
    else:
        click.echo(f"The tables are of revision {revision}.")


def _numbered(reference: str) -> tuple[str, int]:
    parsed = Reference.parse(reference)
    if parsed.scene is None or parsed.number is None:
        raise InvalidReference(
            f"The reference {reference!r} may come to mean another version: write the number, "
            "as in tower@3."
        )
    return parsed.scene, parsed.number
