"""The `registry` commands that look after what was published."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import click

from registry import tables
from registry.commands import (
    Address,
    by_option,
    counting,
    guard_of,
    guard_options,
    json_option,
    numbered,
    numbers,
    pairs,
)
from registry.records import LIVE, Version
from registry.registry import Registry


@click.command()
@click.argument("reference")
@by_option
@json_option
@click.pass_obj
def retire(address: Address, reference: str, by: str | None, as_json: bool) -> None:
    """Hide the version REFERENCE, such as tower@3; its bytes are kept until a sweep.

    A version that an alias points to, or that a service holds, is refused.
    """
    version = address.open().retire(*numbered(reference), by=by)
    tables.print_done(version, as_json, "Retired")


@click.command()
@click.argument("reference")
@by_option
@json_option
@click.pass_obj
def restore(address: Address, reference: str, by: str | None, as_json: bool) -> None:
    """Bring back the retired version REFERENCE, such as tower@3."""
    version = address.open().restore(*numbered(reference), by=by)
    tables.print_done(version, as_json, "Restored")


@click.command()
@click.argument("reference")
@click.argument("labels", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--remove", "removed", multiple=True, metavar="KEY", help="Tag to remove.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=X", help="Measured of it.")
@by_option
@json_option
@click.pass_obj
def tag(
    address: Address,
    reference: str,
    labels: tuple[str, ...],
    removed: tuple[str, ...],
    metrics: tuple[str, ...],
    by: str | None,
    as_json: bool,
) -> None:
    """Set tags and metrics of the version REFERENCE, such as tower@3."""
    scene, number = numbered(reference)
    changes: dict[str, str | None] = {**pairs(labels, "the tag"), **dict.fromkeys(removed)}
    measured = numbers(metrics, "--metric")
    version = address.open().tag(scene, number, changes, metrics=measured, by=by)
    tables.print_done(version, as_json, "Labelled")


@click.command()
@click.argument("scene")
@click.option("--alias", default=LIVE, show_default=True)
@by_option
@json_option
@click.pass_obj
def protect(address: Address, scene: str, alias: str, by: str | None, as_json: bool) -> None:
    """Guard an alias of SCENE: from now on it moves only with --override."""
    address.open().protect(scene, alias, by=by)
    _print_guard(scene, alias, True, as_json)


@click.command()
@click.argument("scene")
@click.option("--alias", default=LIVE, show_default=True)
@by_option
@json_option
@click.pass_obj
def unprotect(address: Address, scene: str, alias: str, by: str | None, as_json: bool) -> None:
    """Lift the guard of an alias of SCENE."""
    address.open().unprotect(scene, alias, by=by)
    _print_guard(scene, alias, False, as_json)


def _print_guard(scene: str, alias: str, protected: bool, as_json: bool) -> None:
    if as_json:
        tables.print_json({"scene": scene, "alias": alias, "protected": protected})
    else:
        click.echo(f"{scene}@{alias} is {'now' if protected else 'no longer'} protected.")


@click.command()
@guard_options
@json_option
@click.pass_context
def verify(ctx: click.Context, policy: str, keys: tuple[Path, ...], as_json: bool) -> None:
    """Read every capsule and compare it with its digest and its row.

    With --verify and --key signatures are checked too. Exit status 1 when something is wrong.
    Nothing is changed.
    """
    guard = guard_of(policy, keys)
    registry = ctx.obj.open()
    count = 0
    with counting("Read") as step:

        def seen(version: Version) -> None:
            nonlocal count
            count += 1
            step(version.reference)

        faults = registry.verify(seen) + guard.faults(registry)
    if as_json:
        tables.print_json({"versions": count, "faults": faults})
    else:
        for fault in faults:
            click.echo(f"{fault.thing}: {fault.message}")
        click.echo(f"Read {count} versions, found {len(faults)} faults.")
    ctx.exit(1 if faults else 0)


@click.command()
@click.option(
    "--grace-days",
    type=click.FloatRange(0),
    default=7.0,
    show_default=True,
    help="How long bytes wait, once marked, before they are removed.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@by_option
@json_option
@click.pass_obj
def sweep(
    address: Address, grace_days: float, dry_run: bool, by: str | None, as_json: bool
) -> None:
    """Remove the bytes that no version in use needs and no service holds.

    The first sweep marks them, one after the grace period removes them. It may be interrupted and
    repeated at any time.
    """
    done = address.open().sweep(grace=timedelta(days=grace_days), dry_run=dry_run, by=by)
    if as_json:
        tables.print_json(done)
        return
    would = "Would have marked" if dry_run else "Marked"
    click.echo(
        f"{would} {len(done.marked)}, spared {len(done.spared)} and removed {len(done.removed)} "
        f"capsules ({done.removed_bytes} bytes), and {len(done.torn)} torn files."
    )


@click.command()
@click.argument("scene")
@click.option("--reason", required=True, help="Why, for the tombstone that remains.")
@click.option("--force", is_flag=True, help="Even while a service holds some of it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@by_option
@json_option
@click.pass_obj
def erase(
    address: Address,
    scene: str,
    reason: str,
    force: bool,
    yes: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Remove SCENE for good: versions, aliases, history, bytes and signatures.

    A tombstone remains; neither the name nor the bytes are taken again. Copies in other
    registries, exports and backups are not reached.
    """
    registry = address.open()
    versions = registry.scene(scene).latest
    if not yes:
        click.confirm(f"Erase {scene} and its {versions} versions for good?", abort=True, err=True)
    done = registry.erase(scene, reason=reason, force=force, by=by)
    if as_json:
        tables.print_json(done)
    else:
        click.echo(
            f"Erased {scene}: {len(done.removed)} capsules are gone, {len(done.shared)} stay with "
            "other scenes."
        )


@click.command()
@json_option
@click.pass_obj
def upgrade(address: Address, as_json: bool) -> None:
    """Bring the database of an older registry to the tables of this one."""
    revision = Registry.upgrade(address.place, database=address.database)
    if as_json:
        tables.print_json({"revision": revision})
    else:
        click.echo(f"The tables are of revision {revision}.")


KEEPING = (retire, restore, tag, protect, unprotect, verify, sweep, erase, upgrade)
