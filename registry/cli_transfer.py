"""The `registry` commands between a registry and the rest: exports, copies, events, signatures."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path

import click
from sqlalchemy.engine import URL

from registry import deliveries, signing, tables
from registry.address import own_database
from registry.commands import (
    Address,
    Refused,
    by_option,
    counting,
    json_option,
    override_option,
)
from registry.events import watch as watch_events
from registry.manifest import open_export
from registry.registry import Registry
from registry.source import RegistrySource
from registry.transfer import Transfer, export_scenes, import_scenes
from registry.webhooks import SECRET_VARIABLE, Courier

PASSWORD_VARIABLE = "REALFILL_SIGNING_PASSWORD"


@click.command("export")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("scenes", nargs=-1)
@json_option
@click.pass_obj
def export_command(address: Address, out: Path, scenes: tuple[str, ...], as_json: bool) -> None:
    """Write SCENES, by default all, to the directory OUT, or to a file that ends in .tar.

    Capsules, signatures, and a manifest with digests, aliases and history. An interrupted export
    to a directory goes on where it was when it is started again.
    """
    registry = address.open()
    with counting("Wrote") as step:
        done = export_scenes(registry, out, scenes, progress=step)
    _print_transfers(done, as_json, f"to {out}")


@click.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("scenes", nargs=-1)
@click.option("--as", "rename", metavar="NAME", help="Name of the one scene here.")
@override_option
@by_option
@json_option
@click.pass_obj
def import_command(
    address: Address,
    source: Path,
    scenes: tuple[str, ...],
    rename: str | None,
    override: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Take SCENES, by default all, from the export SOURCE.

    A scene that is here already is only carried forward: if it went another way, nothing of it is
    changed.
    """
    registry = address.open(create=True)
    with counting("Read") as step:
        done = import_scenes(
            registry,
            open_export(source),
            scenes,
            rename=rename,
            by=by,
            override=override,
            progress=step,
        )
    _print_transfers(done, as_json, f"from {source}")


@click.command()
@click.argument("target", metavar="TARGET")
@click.argument("scenes", nargs=-1)
@click.option("--target-database", metavar="URL", help="Database of the other registry.")
@click.option("--as", "rename", metavar="NAME", help="Name of the one scene there.")
@override_option
@by_option
@json_option
@click.pass_obj
def copy(
    address: Address,
    target: str,
    scenes: tuple[str, ...],
    target_database: str | None,
    rename: str | None,
    override: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Carry SCENES, by default all, to the registry TARGET, a directory or s3://bucket/prefix.

    Every capsule is checked against its digest on both sides. An interrupted copy is repeated:
    what arrived is not sent again.
    """
    source = RegistrySource(address.open(), scenes)
    # Never this registry's database: its variable belongs to the registry that is read.
    database = target_database or _own_database(target)
    other = Registry.open(target, database=database)
    with counting("Copied") as step:
        done = import_scenes(
            other, source, scenes, rename=rename, by=by, override=override, progress=step
        )
    _print_transfers(done, as_json, f"to {target}")


def _own_database(target: str) -> URL:
    if target.startswith("s3://"):
        raise Refused(f"The registry {target} needs a database: name it with --target-database.")
    return own_database(Path(target.removeprefix("file://")))


def _print_transfers(done: list[Transfer], as_json: bool, where: str) -> None:
    if as_json:
        tables.print_json(done)
        return
    tables.print_transfers(done)
    click.echo(f"{len(done)} scenes {where}.")


@click.command()
@click.option("--since", type=click.IntRange(0), metavar="N", help="Begin behind event N.")
@click.option("--once", is_flag=True, help="End when there is nothing new.")
@click.option("--every", "every_s", type=click.FloatRange(0.05), default=1.0, show_default=True)
@json_option
@click.pass_obj
def watch(address: Address, since: int | None, once: bool, every_s: float, as_json: bool) -> None:
    """Print events as they come, one a line, until Ctrl-C.

    Only new ones, unless --since names a number; --since 0 begins with the first.
    """
    registry = address.open()

    class NothingNew(Exception):
        pass

    def wait(pause_s: float) -> None:
        if once:
            raise NothingNew
        time.sleep(pause_s)

    try:
        for event in watch_events(registry, after=since, every_s=every_s, wait=wait):
            if as_json:
                line = {"id": event.id, **json.loads(event.payload)}
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                click.echo(tables.event_line(event))
    except NothingNew:
        return
    except KeyboardInterrupt:
        click.echo("", err=True)


@click.command()
@click.argument("urls", nargs=-1, metavar="URL...")
@click.option("--from-start", is_flag=True, help="Send new endpoints all that ever happened.")
@click.option("--once", is_flag=True, help="End when nothing is due.")
@click.option("--again", is_flag=True, help="First let events that were given up be sent again.")
@click.option("--every", "every_s", type=click.FloatRange(0.05), default=1.0, show_default=True)
@click.option("--status", is_flag=True, help="Only tell how far each endpoint came, then end.")
@click.option("--forget", is_flag=True, help="Only drop each URL with what waits for it, then end.")
@json_option
@click.pass_obj
def deliver(
    address: Address,
    urls: tuple[str, ...],
    from_start: bool,
    once: bool,
    again: bool,
    every_s: float,
    status: bool,
    forget: bool,
    as_json: bool,
) -> None:
    """Send the events of the registry to each URL, signed, until Ctrl-C.

    A URL that is new gets every event from now on; one that is known goes on where it was.
    Signatures follow Standard Webhooks; REALFILL_WEBHOOK_SECRET holds the secret, or several with
    spaces between them. At least once: receivers drop an event whose webhook-id they have seen.
    """
    registry = address.open()
    addresses = [deliveries.address_of(url) for url in urls]
    if status or forget:
        _settle(registry, addresses, forget, as_json)
        return
    if again:
        count = deliveries.send_again(registry.database, addresses)
        click.echo(f"{count} events will be sent again.", err=True)
    secrets = os.environ.get(SECRET_VARIABLE, "").split()
    with closing(Courier(registry, urls, secrets, from_start=from_start)) as courier:
        since = "the first event" if from_start else "now"
        for endpoint in courier.new:
            click.echo(f"{endpoint} is new: it gets events from {since} on.", err=True)
        try:
            while (done := _print_round(courier, as_json)) or not once:
                if not done:
                    time.sleep(every_s)
        except KeyboardInterrupt:
            click.echo("", err=True)


def _settle(registry: Registry, addresses: list[str], forget: bool, as_json: bool) -> None:
    if forget and not addresses:
        raise Refused("There is no URL to forget: name it, as `--status` lists it.")
    states = deliveries.states(registry.database, addresses)
    if forget:
        deliveries.forget(registry.database, addresses)
    if as_json:
        tables.print_json(states)
        return
    tables.print_endpoints(states)
    if forget:
        click.echo("Forgotten, with what waited for them.")


def _print_round(courier: Courier, as_json: bool) -> bool:
    """Whether anything was due."""
    done = courier.round()
    for delivery in done:
        if as_json:
            line = {"id": delivery.event.id, "endpoint": delivery.endpoint}
            click.echo(json.dumps(line | {"failure": delivery.failure}, ensure_ascii=False))
        else:
            click.echo(tables.delivery_line(delivery))
    return bool(done)


@click.command()
@click.argument("reference")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PEM",
    help=f"Private elliptic key; {PASSWORD_VARIABLE} holds its password, if it has one.",
)
@by_option
@json_option
@click.pass_obj
def sign(address: Address, reference: str, key: Path, by: str | None, as_json: bool) -> None:
    """Sign the capsule that REFERENCE names, with the package model-signing.

    `registry verify --verify require --key public.pem` checks it, as fetch and the service can.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    version = signing.sign(address.open(), reference, key, password=password, by=by)
    tables.print_done(version, as_json, "Signed")


TRANSFER = (export_command, import_command, copy, watch, deliver, sign)
