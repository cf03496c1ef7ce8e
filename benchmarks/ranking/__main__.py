"""``python -m benchmarks.ranking``: ranking against naive kornia pairs, as rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import surroundings
from benchmarks.command import Measurement
from benchmarks.engine.timing import quantile, repeated
from benchmarks.ranking import peer
from benchmarks.ranking.memory import peak_bytes
from benchmarks.ranking.pictures import Pictures, pictures
from benchmarks.record import ROWS, Row, record, table_of
from realfill.errors import RealFillError
from realfill.nano.stereo import check_stereo
from realfill.rank import Matcher, Ranking, load_matcher, prepare_references, rank_candidates
from realfill.rank.matching import LoFTRMatcher

CANDIDATES = 16
# Counts of the true stereo pair below this say that the matcher does not work at all.
LEAST_MATCHES = 60


@dataclass(frozen=True)
class Bench:
    """What is measured, how often, and where rows go.

    Attributes:
        source: Whose weights, as for ``load_matcher``.
        torch_matcher: LoFTR in torch, whose weights the peer shares.
        onnx_matcher: The same in ONNX Runtime, None where it has no provider for the device.
        matcher: What a service would use on the device.
        seen: What is ranked.
    """

    source: str
    torch_matcher: LoFTRMatcher
    onnx_matcher: Matcher | None
    matcher: Matcher
    seen: Pictures
    repeats: int
    rows: Path

    @property
    def device(self) -> torch.device:
        """Where all of them run."""
        return self.torch_matcher.device

    def keep(self, name: str, value: float, unit: str, **details: Any) -> Row:
        """Record a row under its name, or under its name on a GPU."""
        on_cuda = self.device.type == "cuda"
        return record(f"{name}.cuda" if on_cuda else name, value, unit, path=self.rows, **details)


def ranker(bench: Bench, matcher: Matcher) -> Callable[[], Ranking]:
    """Ranks the candidates against references that were looked at before."""
    references = prepare_references(matcher, bench.seen.references)
    return lambda: rank_candidates(matcher, bench.seen.candidates, bench.seen.mask, references)


def agree(ours: Tensor, theirs: Tensor, device: torch.device) -> bool:
    """Whether counts are equal; on a GPU, but for one in a hundred, or a single one.

    Its libraries choose convolutions by the number of pictures, and a confidence on the threshold
    may fall to either side of it.
    """
    allowed = (0.01 * theirs).clamp(min=1) if device.type == "cuda" else torch.zeros(())
    return bool(((ours - theirs).abs() <= allowed).all())


def bench_speed(bench: Bench) -> list[Row]:
    """Ours, in both programs, and the peer's, in turns; refuses unless counts agree.

    Raises:
        RuntimeError: Counts differ, so that timing them means nothing.
    """
    model = peer.naive_kornia(bench.torch_matcher)
    truth = peer.counts(model, bench.seen)
    works: dict[str, Callable[[], object]] = {"kornia": lambda: peer.counts(model, bench.seen)}
    for matcher in filter(None, (bench.torch_matcher, bench.onnx_matcher)):
        rank = ranker(bench, matcher)
        mine = rank().per_reference.cpu()
        if not agree(mine, truth, bench.device):
            raise RuntimeError(
                f"{matcher.name} counts {mine.tolist()}, kornia {truth.tolist()}: mend the matcher "
                "before it is timed"
            )
        works[matcher.name] = rank
    seconds: dict[str, list[float]] = {name: [] for name in works}
    # In turns, so that a busy minute of the machine touches all of them.
    for turn in range(bench.repeats):
        for name, work in works.items():
            seconds[name] += repeated(work, 1, bench.device, warm_up=1 if turn == 0 else 0)
    theirs, ours = seconds["kornia"], seconds[bench.matcher.name]
    ratio = median(theirs) / median(ours)
    size = f"{len(bench.seen.candidates)}x{len(bench.seen.references)}"
    rows = [
        bench.keep("rank.ratio_kornia", ratio, "x", peer=peer.PEER, ratio=ratio),
        *(
            bench.keep(
                f"rank.{size}_ms" if percent == 50 else f"rank.{size}_p{percent}_ms",
                1000 * quantile(ours, percent),
                "ms",
                better="lower",
                peer=peer.PEER,
                peer_value=1000 * quantile(theirs, percent),
            )
            for percent in (20, 50, 80)
        ),
    ]
    if bench.onnx_matcher is not None:
        with_torch, with_onnx = (seconds[m.name] for m in (bench.torch_matcher, bench.onnx_matcher))
        ratio = median(with_torch) / median(with_onnx)
        rows.append(
            bench.keep("rank.onnx_ratio", ratio, "x", peer="the same in torch", ratio=ratio)
        )
    return rows


def bench_memory(bench: Bench) -> list[Row]:
    """The peak of a first ranking, beside that of one naive pair."""
    model = peer.naive_kornia(bench.torch_matcher)
    one = Pictures(bench.seen.candidates[:1], bench.seen.references[:1], bench.seen.mask)
    # A matcher that has never run, so that what it sets up counts too.
    rank = ranker(bench, load_matcher(bench.source, bench.device))
    ours = peak_bytes(rank, bench.device)
    theirs = peak_bytes(lambda: peer.counts(model, one), bench.device)
    kept = {"better": "lower", "peer": "one pair of kornia LoFTR.forward", "peer_value": theirs}
    return [bench.keep("rank.peak_bytes", ours, "B", **kept)]


def bench_truth(bench: Bench) -> list[Row]:
    """Matches of the motorcycle's two views against their true disparity.

    Raises:
        RuntimeError: There are too few matches for their precision to mean anything.
    """
    check = check_stereo(bench.matcher)
    if check.matches < LEAST_MATCHES:
        raise RuntimeError(f"{check.matches} matches of the true pair, {LEAST_MATCHES} are needed")
    # Accuracy is a matter of weights: its name has no device, and only the row says which it was.
    device = surroundings.device(bench.device.type == "cuda")
    return [
        record(name, value, unit, device=device, path=bench.rows)
        for name, value, unit in (
            ("rank.motorcycle_precision", check.precision, "share"),
            ("rank.motorcycle_matches", check.matches, "matches"),
        )
    ]


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "memory": bench_memory,
    "speed": bench_speed,
    "truth": bench_truth,
}


@click.command(cls=Measurement, free={"device"})
@click.option("--source", default="nano", show_default=True, help="nano, outdoor or a file.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Default: all."
)
@click.option("--candidates", type=click.IntRange(min=1), default=CANDIDATES, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
def main(
    source: str, device: str, parts: tuple[str, ...], candidates: int, repeats: int, rows: Path
) -> None:
    """Measure the ranking of 16 candidates by 3 references on this machine, and record rows."""
    measured: list[Row] = []
    try:
        bench = prepared(source, device, candidates=candidates, repeats=repeats, rows=rows)
        for name in parts or PARTS:
            measured += PARTS[name](bench)
    except (RealFillError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    Console().print(table_of(measured))


def _in_onnx(source: str, device: str) -> Matcher | None:
    try:
        return load_matcher(f"onnx:{source}", device)
    except RealFillError as error:
        if device == "cpu":
            raise
        click.echo(f"Without ONNX Runtime: {error}", err=True)
        return None


def prepared(source: str, device: str, *, candidates: int, repeats: int, rows: Path) -> Bench:
    """Matchers and pictures, loaded once."""
    torch_matcher = load_matcher(f"torch:{source}", device)
    assert isinstance(torch_matcher, LoFTRMatcher)
    onnx_matcher, chosen = _in_onnx(source, device), load_matcher(source, device)
    seen = pictures(torch_matcher.working_px, candidates)
    place = torch_matcher.device
    return Bench(
        source=source,
        torch_matcher=torch_matcher,
        onnx_matcher=onnx_matcher,
        matcher=onnx_matcher
        if onnx_matcher and chosen.name == onnx_matcher.name
        else torch_matcher,
        seen=Pictures(
            seen.candidates.to(place), tuple(r.to(place) for r in seen.references), seen.mask
        ),
        repeats=repeats,
        rows=rows,
    )


if __name__ == "__main__":
    main()
