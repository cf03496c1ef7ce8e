"""Commands that record rows: work of which no name tells does not go into the project's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click

from benchmarks.record import ROWS

# How often, which parts, where to and how printed: none of it makes another measurement.
FREE = frozenset({"repeats", "parts", "rows", "out", "as_json"})
# Whose rows those with .cuda are.
GPU_BASE = "sd2-random"
# Scenes with a truth in the folder of photographs; with the demo's two they are five.
PHOTOGRAPHED = 3
Free: TypeAlias = Collection[str] | Callable[[Mapping[str, Any]], Collection[str]]


class Measurement(click.Command):
    """A command that adds to the project's own rows only what their names tell.

    A name stands for the command without options. Any option that is given otherwise makes a trial
    of it, whose rows go into a file of their own, unless the option is free.

    Args:
        free: Parameters that leave the work as it is, or of which rows' names tell; or what finds
            them from the values of all. Those of ``FREE`` always are.
    """

    def __init__(self, *args: Any, free: Free = (), **details: Any) -> None:
        super().__init__(*args, **details)
        self._free = free

    def invoke(self, ctx: click.Context) -> Any:
        """Refuse a trial before it begins, then measure."""
        if ctx.params["rows"].resolve() == ROWS.resolve() and (untold := self.untold(ctx)):
            raise click.UsageError(
                f"No row's name would tell of {', '.join(untold)}: give --rows FILE for a trial.",
                ctx,
            )
        return super().invoke(ctx)

    def untold(self, ctx: click.Context) -> list[str]:
        """Options of which rows' names do not tell, as they were given."""
        free = self._free(ctx.params) if callable(self._free) else self._free
        plain = self.make_context(ctx.info_name, []).params
        return [
            _as_given(param, ctx.params[name])
            for param in self.params
            if (name := str(param.name)) not in {*FREE, *free} and ctx.params[name] != plain[name]
        ]


class OfPhotographs(Measurement):
    """A command whose names stand for the demo's two scenes and three photographed ones."""

    def __init__(self, *args: Any, free: Collection[str] = (), **details: Any) -> None:
        super().__init__(*args, free={"folder", *free}, **details)

    def untold(self, ctx: click.Context) -> list[str]:
        """Options as they were given, and another number of scenes than the names stand for."""
        folder: Path | None = ctx.params["folder"]
        found = 0 if folder is None else len(list(folder.glob("*/target/gt.*")))
        other = [] if found == PHOTOGRAPHED else [f"{found} --scenes with a truth"]
        return super().untold(ctx) + other


def on_gpu(params: Mapping[str, Any]) -> set[str]:
    """Parameters of which ``.cuda`` in a name tells: the device, with the base of a GPU's rows."""
    told = params["device"].startswith("cuda") and params["base_name"] == GPU_BASE
    return {"device", "base_name"} if told else set()


def _as_given(param: click.Parameter, value: Any) -> str:
    if isinstance(value, bool):
        return (param.opts if value else param.secondary_opts)[0]
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([param.opts[0], *map(str, values)])
