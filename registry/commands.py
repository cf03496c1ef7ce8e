"""What the `registry` commands share: their group, their options, and where the registry is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from registry.errors import InvalidReference, RegistryError
from registry.records import Reference
from registry.registry import Registry
from registry.signing import KEYS_VARIABLE, POLICY_VARIABLE, Guard, Policy

Command = Callable[..., Any]


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
        """The registry; only what fills one creates it."""
        return Registry.open(self.place, database=self.database, create=create)


class Moment(click.ParamType[datetime]):
    """A time in ISO 8601, in UTC where it names no zone."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Read the time, or refuse it."""
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: write it like 2026-05-04 or 2026-05-04T12:00:00Z.")
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def json_option(command: Command) -> Command:
    """Adds `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")(command)


def by_option(command: Command) -> Command:
    """Adds `--by` to a command."""
    return click.option("--by", metavar="NAME", help="Who does this; the login name by default.")(
        command
    )


def override_option(command: Command) -> Command:
    """Adds `--override` to a command."""
    return click.option("--override", is_flag=True, help="Also where the alias is protected.")(
        command
    )


def expect_option(command: Command) -> Command:
    """Adds `--expect` to a command."""
    return click.option(
        "--expect",
        type=click.IntRange(0),
        metavar="N",
        help="Refuse unless the alias points to N now; 0: unless there is no such alias.",
    )(command)


def guard_options(command: Command) -> Command:
    """Adds `--verify` and `--key` to a command."""
    policy = click.option(
        "--verify",
        "policy",
        type=click.Choice([one.value for one in Policy]),
        default=Policy.OFF.value,
        show_default=True,
        envvar=POLICY_VARIABLE,
        show_envvar=True,
        help="What to do about signatures: ask for none, warn, or refuse what is not signed.",
    )
    key = click.option(
        "--key",
        "keys",
        type=click.Path(path_type=Path),
        multiple=True,
        envvar=KEYS_VARIABLE,
        show_envvar=True,
        metavar="PEM",
        help="Public key that is trusted; may be repeated.",
    )
    return policy(key(command))


def guard_of(policy: str, keys: tuple[Path, ...]) -> Guard:
    """Who is trusted, and how strictly."""
    return Guard(Policy(policy), keys)


def numbered(reference: str) -> tuple[str, int]:
    """Scene and number of a reference that always names the same version."""
    parsed = Reference.parse(reference)
    if parsed.scene is None or parsed.number is None:
        raise InvalidReference(
            f"The reference {reference!r} may come to mean another version: write the number, "
            "as in tower@3."
        )
    return parsed.scene, parsed.number


def pairs(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """KEY=VALUE texts as a mapping."""
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise Refused(f"{option} {text!r} has no value: write it as KEY=VALUE.")
        found[key] = value
    return found


def numbers(texts: tuple[str, ...], option: str) -> dict[str, float]:
    """NAME=X texts as a mapping to numbers."""
    found = {}
    for name, value in pairs(texts, option).items():
        try:
            found[name] = float(value)
        except ValueError as error:
            raise Refused(f"{option} {name}={value!r} is no number: write it as 21.5.") from error
    return found


def write_file(file: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    # Beside its place first, so that no half of a file ever bears the name.
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Refused(f"{file} cannot be written: {error.strerror}. Name another file.") from error


@contextmanager
def counting(verb: str) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal how far a long command is, by the reference it was last called with."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task, count = progress.add_task(verb, total=None), 0

        def step(reference: str) -> None:
            nonlocal count
            count += 1
            progress.update(task, description=f"{verb} {count} versions, last {reference}")

        yield step
