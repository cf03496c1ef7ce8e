"""What the parts of the engine's benchmark share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Row, record
from realfill.base import Base
from service.engine import Runner


@dataclass(frozen=True)
class Bench:
    """What is measured, how often, and where rows go.

    Attributes:
        repeats: Of everything that takes a second; quick things are repeated more often.
        variant: Behind every row's name: a precision that is not what the service takes by itself.
        requests: To the service, for each image size.
        matcher: That whole requests are ranked with.
    """

    base: Base
    base_name: str
    rank: int
    batches: tuple[int, ...]
    steps: int
    samples: int
    repeats: int
    requests: int
    matcher: str
    rows: Path
    variant: str = ""

    def keep(self, name: str, value: float, unit: str, **details: Any) -> Row:
        """Record a row under its name, or under its name on a GPU."""
        on_cuda = self.base.device.type == "cuda"
        name = f"{name}{'.cuda' if on_cuda else ''}{self.variant}"
        return record(name, value, unit, path=self.rows, **details)


@contextmanager
def running(base: Base, **options: Any) -> Iterator[Runner]:
    """A runner that leaves the base as it was, however the block ends."""
    runner = Runner(base, **options)
    try:
        yield runner
    finally:
        runner.release()
