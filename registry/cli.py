"""The `registry` commands: tables for people, `--json` for programs.

Exit status 0 when done, 1 when `verify` found faults, 2 with one sentence on an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from registry import tables
from registry.cli_keeping import KEEPING
from registry.cli_transfer import TRANSFER
from registry.commands import (
    Address,
    Moment,
    Refused,
    RegistryGroup,
    by_option,
    expect_option,
    guard_of,
    guard_options,
    json_option,
    numbers,
    override_option,
    pairs,
    write_file,
)
from registry.records import DIGEST_PREFIX, LIVE
from registry.registry import DATABASE_VARIABLE, DEFAULT_PLACE, PLACE_VARIABLE
from registry.search import Query


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


def retired_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--retired` to a command."""
    return click.option("--retired", is_flag=True, help="Show retired versions too.")(command)


def query_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the conditions of a search to a command."""
    for option in reversed(
        (
            click.option("--text", help="Occurs in scene, person or prompt."),
            click.option("--tag", "tags", multiple=True, metavar="KEY[=VALUE]", help="Has it."),
            click.option("--base", help="Name or fingerprint of the base."),
            click.option("--rank", type=click.IntRange(1)),
            click.option("--metric", "metrics", multiple=True, metavar="NAME>=X", help="Holds."),
            click.option("--since", type=Moment(), help="Published then or later."),
            click.option("--until", type=Moment(), help="Published before."),
            click.option("--alias", help="An alias of this name points to it."),
        )
    ):
        command = option(command)
    return command


@cli.command("list")
@click.argument("scene", required=False)
@query_options
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.option("--after", metavar="PAGE", help="Go on behind this scene, or where a search ended.")
@click.option("--before", type=click.IntRange(1), metavar="N", help="Versions below this number.")
@retired_option
@json_option
@click.pass_obj
def list_command(
    address: Address,
    /,
    scene: str | None,
    limit: int,
    after: str | None,
    before: int | None,
    as_json: bool,
    **conditions: Any,
) -> None:
    """List the scenes, or the versions of one SCENE, or all versions that meet the conditions.

    With conditions, such as --tag light=dusk --metric psnr>=20 --alias live, versions of all
    scenes are searched, newest first.
    """
    registry = address.open()
    wanted = {name: value for name, value in conditions.items() if value}
    retired = bool(wanted.pop("retired", False))
    if wanted:
        tags = {
            key: value or None
            for key, _, value in (t.partition("=") for t in wanted.pop("tags", ()))
        }
        query = Query(scene=scene, tags=tags, retired=retired, **wanted)
        page = registry.search(query, after=after, limit=limit)
        if as_json:
            tables.print_json(page)
        else:
            tables.print_versions(page.versions)
            if page.after is not None:
                click.echo(f"There are more: --after {page.after}")
    elif scene is None:
        scenes = registry.scenes(after=after or "", limit=limit)
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
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Say this of it.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=X", help="Measured of it.")
@click.option("--parent", type=click.IntRange(1), metavar="N", help="Version it was trained from.")
@override_option
@by_option
@json_option
@click.pass_obj
def publish(
    address: Address,
    /,
    capsule: Path,
    alias: str,
    no_alias: bool,
    tags: tuple[str, ...],
    metrics: tuple[str, ...],
    as_json: bool,
    **details: Any,
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
    version = registry.publish(
        data,
        alias=None if no_alias else alias,
        tags=pairs(tags, "--tag"),
        metrics=numbers(metrics, "--metric"),
        **details,
    )
    tables.print_done(version, as_json, "Published")


@cli.command()
@click.argument("reference")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@guard_options
@json_option
@click.pass_obj
def fetch(
    address: Address,
    reference: str,
    file: Path,
    policy: str,
    keys: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Write the capsule that REFERENCE names to FILE, after checking its bytes."""
    guard = guard_of(policy, keys)
    registry = address.open()
    version = registry.resolve(reference)
    data = registry.fetch(f"{DIGEST_PREFIX}{version.digest}")
    fault = guard.check(registry, version, data)
    write_file(file, data)
    if fault is not None:
        click.echo(f"Warning: {fault}", err=True)
    tables.print_done(version, as_json, f"Wrote {file} from")


@cli.command()
@click.argument("scene")
@click.argument("alias")
@click.argument("number", type=click.IntRange(1))
@expect_option
@override_option
@by_option
@json_option
@click.pass_obj
def alias(
    address: Address,
    scene: str,
    alias: str,
    number: int,
    expect: int | None,
    override: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Point ALIAS of SCENE to the version NUMBER."""
    version = address.open().set_alias(
        scene, alias, number, expect=expect, by=by, override=override
    )
    tables.print_done(version, as_json, f"{alias} is now")


@cli.command()
@click.argument("reference")
@click.option("--to", default=LIVE, show_default=True, metavar="ALIAS", help="Alias to move.")
@expect_option
@override_option
@by_option
@json_option
@click.pass_obj
def promote(
    address: Address,
    reference: str,
    to: str,
    expect: int | None,
    override: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Make the version that REFERENCE names live, for instance tower@candidate."""
    version = address.open().promote(reference, to=to, expect=expect, by=by, override=override)
    tables.print_done(version, as_json, f"{to} is now")


@cli.command()
@click.argument("scene")
@click.option("--alias", default=LIVE, show_default=True, help="Alias to move back.")
@expect_option
@override_option
@by_option
@json_option
@click.pass_obj
def rollback(
    address: Address,
    scene: str,
    alias: str,
    expect: int | None,
    override: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Point an alias of SCENE back to the version it left; again goes further back."""
    version = address.open().rollback(scene, alias, expect=expect, by=by, override=override)
    tables.print_done(version, as_json, f"{alias} is back at")


@cli.command()
@click.argument("scene")
@click.option("--alias", help="Only the moves of this alias.")
@json_option
@click.pass_obj
def history(address: Address, scene: str, alias: str | None, as_json: bool) -> None:
    """Show every move of the aliases of SCENE: when, from where, to where, by whom."""
    moves = address.open().history(scene, alias)
    tables.print_json(moves) if as_json else tables.print_moves(moves)


for command in (*KEEPING, *TRANSFER):
    cli.add_command(command)
