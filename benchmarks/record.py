"""Keeps measurements: one JSON object per line of ``results/rows.jsonl``, only ever appended.

``python -m benchmarks.record targets`` holds the latest row of each name against its target.
``python -m benchmarks.record add FILE`` appends rows that another process measured.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import surroundings
from benchmarks.targets import TARGETS, Better, Target, on_cuda

ROWS = Path(__file__).parent / "results" / "rows.jsonl"
NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True)
class Row:
    """One measurement, with all that is needed to judge and to repeat it.

    ``ratio`` says how many times better than the peer the value is, above 1 for better.
    """

    name: str
    value: float
    unit: str
    better: Better
    target: float | None
    peer: str | None
    peer_value: float | None
    ratio: float | None
    command: str
    machine: str
    device: str
    versions: dict[str, str]
    commit: str
    time: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"Row name {self.name!r} is not of the form area.measure_unit.")
        for field in ("value", "target", "peer_value", "ratio"):
            number = getattr(self, field)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"Row {self.name}: {field} is {number}; measure it again.")

    def standard(self) -> Target | None:
        """The target of the table where it has the name, else the row's own, if any."""
        if self.name in TARGETS:
            return TARGETS[self.name]
        return None if self.target is None else Target(self.target, self.unit, self.better)


def measurement(
    name: str,
    value: float,
    unit: str,
    *,
    target: float | None = None,
    better: Better | None = None,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    command: str | None = None,
    device: str | None = None,
) -> Row:
    """A row of here and now; a name of the target table brings its target and direction along.

    Args:
        name: Dotted row name; the part ``cuda`` marks a measurement on a GPU.
        value: What was measured, in ``unit``.
        unit: Unit of the value, ``x`` for a ratio.
        target: Bound of a name that the table lacks.
        better: Direction of a name that the table lacks, ``higher`` if not given.
        peer: What the value was measured against, in the same run.
        peer_value: The peer's value, in the same unit.
        ratio: How many times better than the peer; found from both values if not given.
        command: How to repeat it; the command line of this process if not given.
        device: Overrides what the name says about the device.

    Raises:
        ValueError: The name is malformed, a number is not finite, or unit, direction or bound
            contradict the table.
    """
    standard = TARGETS.get(name)
    if standard is not None:
        _agree(name, standard, unit=unit, better=better, bound=target)
        target, better = standard.bound, standard.better
    better = better or "higher"
    if ratio is None and peer_value is not None and min(value, peer_value) > 0:
        ratio = value / peer_value if better == "higher" else peer_value / value
    return Row(
        name=name,
        value=float(value),
        unit=unit,
        better=better,
        target=target,
        peer=peer,
        peer_value=peer_value,
        ratio=ratio,
        command=command or surroundings.command(),
        machine=surroundings.machine(),
        device=device or surroundings.device(on_cuda(name)),
        versions=surroundings.versions(),
        commit=surroundings.commit(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def record(name: str, value: float, unit: str, *, path: Path = ROWS, **details: Any) -> Row:
    """Append one measurement to the rows; ``details`` are those of :func:`measurement`."""
    row = measurement(name, value, unit, **details)
    _append([row], path)
    return row


def _agree(name: str, standard: Target, **given: Any) -> None:
    for field, value in given.items():
        expected = getattr(standard, field)
        if value is not None and value != expected:
            raise ValueError(
                f"Row {name}: {field} is {value!r}, but benchmarks/targets.py says {expected!r};"
                " change one of them."
            )


def _append(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    # One write to a file opened for appending: two processes never mix their lines.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, "".join(lines).encode())
    finally:
        os.close(handle)


def read_rows(path: Path = ROWS) -> list[Row]:
    """All rows, oldest first; a missing file holds none.

    Raises:
        ValueError: A line is not a row; the message names file and line.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}:{number} is not a row ({error}); mend it.") from error
    return rows


@dataclass(frozen=True)
class Finding:
    """A target that is missed (with the value reached) or not yet measured (without)."""

    name: str
    bound: float
    unit: str
    better: Better
    value: float | None
    device: str | None
    commit: str | None
    time: str | None


def findings(rows: Iterable[Row]) -> list[Finding]:
    """Every latest row that misses its target, and every name of the table without a row.

    Later lines win over earlier ones of the same name.
    """
    latest = {row.name: row for row in rows}
    found = []
    for name in [*TARGETS, *(name for name in latest if name not in TARGETS)]:
        row = latest.get(name)
        standard = TARGETS[name] if row is None else row.standard()
        if standard is None or (row is not None and standard.met_by(row.value)):
            continue
        found.append(
            Finding(
                name=name,
                bound=standard.bound,
                unit=standard.unit,
                better=standard.better,
                value=row.value if row else None,
                device=row.device if row else None,
                commit=row.commit if row else None,
                time=row.time if row else None,
            )
        )
    return found


def table_of(rows: Sequence[Row]) -> Table:
    """The rows, beside their targets and peers."""
    table = Table(title=f"{rows[0].device}, {rows[0].machine}", title_justify="left")
    for heading in ("row", "value", "target", "ratio", "peer"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.value:.4g} {row.unit}",
            "" if row.target is None else f"{row.target:g}",
            "" if row.ratio is None else f"{row.ratio:.3g}x",
            row.peer or "",
        )
    return table


def _short(commit: str) -> str:
    dirty = surroundings.DIRTY if commit.endswith(surroundings.DIRTY) else ""
    return commit[:10] + dirty


def met_by_a_changed_tree(rows: Iterable[Row]) -> list[str]:
    """Names whose latest row meets its target, of a tree with changes that no commit has."""
    return [
        row.name
        for row in {row.name: row for row in rows}.values()
        if row.commit.endswith(surroundings.DIRTY)
        and (standard := row.standard()) is not None
        and standard.met_by(row.value)
    ]


def _table(found: list[Finding]) -> Table:
    table = Table(title="Targets missed or not yet measured", title_justify="left")
    table.add_column("row", overflow="fold")
    for heading in ("target", "reached", "device", "commit"):
        table.add_column(heading, justify="right" if heading in ("target", "reached") else "left")
    for finding in found:
        sign = "≥" if finding.better == "higher" else "≤"
        reached = "no row" if finding.value is None else f"{finding.value:.4g} {finding.unit}"
        table.add_row(
            finding.name,
            f"{sign} {finding.bound:g} {finding.unit}",
            reached,
            finding.device or "",
            _short(finding.commit or ""),
        )
    return table


@click.group()
def main() -> None:
    """Measurements and the targets they must reach."""


_rows_option = click.option(
    "--rows",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=ROWS,
    help="File of the rows.",
)


@main.command()
@_rows_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def targets(path: Path, as_json: bool) -> None:
    """Print every latest row that misses its target and every name without a row."""
    try:
        rows = read_rows(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    found = findings(rows)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
        return
    if found:
        Console().print(_table(found))
        missed = sum(finding.value is not None for finding in found)
        click.echo(f"{missed} missed, {len(found) - missed} without a row.")
    else:
        click.echo(f"All {len(TARGETS)} targets are met.")
    if changed := met_by_a_changed_tree(rows):
        names = ", ".join(changed)
        click.echo(f"{len(changed)} met by a tree with changes that no commit has: {names}.")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--command", required=True, help="The command that measured the rows.")
@_rows_option
def add(file: Path, command: str, path: Path) -> None:
    """Append the rows of FILE, all or none.

    Each line is a JSON object with name, value, unit and whatever else record() takes.
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            rows.append(measurement(**{"command": command, **json.loads(line)}))
        except (TypeError, ValueError) as error:
            raise click.ClickException(f"{file.name}:{number} cannot be added: {error}") from error
    _append(rows, path)
    click.echo(f"{len(rows)} rows added to {path.name}.")


if __name__ == "__main__":
    main()
