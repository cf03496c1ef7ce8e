"""``python -m benchmarks.quality.confusion``: do photographs of one place match each other best?

Every reference of every scene is matched with every other photograph there is. A matcher that is
good for something finds more correspondences within a scene than across.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.command import OfPhotographs
from benchmarks.quality.sampling import device_name
from benchmarks.quality.summary import markdown_table
from benchmarks.record import ROWS, record
from realfill.errors import RealFillError
from realfill.nano.demo import demo_scenes
from realfill.nano.difficulties import synthetic_scenes
from realfill.rank import Matcher, loftr, prepare_references, rank_candidates
from realfill.rank.consistency import consistent
from realfill.scene import Scene, load_scene

# Of the reference's long side: how far a correspondence may lie from where the homography puts it.
WITHIN_SHARE = 1 / 32


@dataclass(frozen=True)
class Confusion:
    """Matches of photographs, by the scenes that they show.

    Attributes:
        scenes: Names, in the order of the table.
        means: Mean matches of a photograph of one scene (row) and one of another (column).
        least_true: By scene, the fewest matches of two of its own photographs.
        most_wrong: By scene, the most matches of one of its photographs with a foreign one.
    """

    scenes: tuple[str, ...]
    means: tuple[tuple[float, ...], ...]
    least_true: tuple[int, ...]
    most_wrong: tuple[int, ...]

    @property
    def averages(self) -> tuple[float, float]:
        """Mean of the table's diagonal, and of all else."""
        cells = [(j == k, mean) for k, row in enumerate(self.means) for j, mean in enumerate(row)]
        true, wrong = ([mean for same, mean in cells if same == kind] for kind in (True, False))
        return fmean(true), fmean(wrong)

    @property
    def confused(self) -> tuple[str, ...]:
        """Scenes of which some wrong pairing has as many matches as some true one."""
        return tuple(
            name
            for name, true, wrong in zip(self.scenes, self.least_true, self.most_wrong, strict=True)
            if wrong >= true
        )

    @property
    def confused_on_average(self) -> tuple[str, ...]:
        """Scenes that match some other scene at least as well as themselves, on average."""
        return tuple(
            name
            for k, (name, row) in enumerate(zip(self.scenes, self.means, strict=True))
            if max((mean for j, mean in enumerate(row) if j != k), default=0) >= row[k]
        )


@dataclass(frozen=True)
class Site:
    """One place with all photographs of it, at least two for a table. [3, H, W] each"""

    name: str
    photos: tuple[Tensor, ...]


def sites_of(scenes: Sequence[Scene]) -> list[Site]:
    """The places that scenes show: scenes that share a photograph are of one.

    A scene gives its references, and its true target where it has but one reference.
    """
    found: list[Site] = []
    for scene in scenes:
        photos = list(scene.references)
        if len(photos) == 1 and scene.truth is not None:
            photos.append(scene.truth)
        known = next((site for site in found if share_a_photograph(photos, site.photos)), None)
        if known is None:
            found.append(Site(scene.name, tuple(photos)))
        else:
            fresh = tuple(
                photo for photo in photos if not share_a_photograph([photo], known.photos)
            )
            found[found.index(known)] = Site(known.name, (*known.photos, *fresh))
    return found


def share_a_photograph(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether one picture is among both. [3, H, W] each"""
    return any(torch.equal(a, b) for a in first for b in second)


def matches_of(matcher: Matcher, photos: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Correspondences of every ordered pair of photographs, all over. [P, P] twice

    Returns:
        All of them, and those that agree on one homography.
    """
    prepared = prepare_references(matcher, photos)
    every, agreeing = [], []
    for photo in track(photos, description="match", console=Console(stderr=True)):
        everywhere = torch.ones(photo.shape[-2:])
        ranking = rank_candidates(matcher, photo[None], everywhere, prepared)
        every.append(ranking.per_reference[0].cpu())
        agreeing.append(
            [
                int(consistent(found, within_px=WITHIN_SHARE * max(other.shape[-2:])).sum())
                for found, other in zip(ranking.correspondences, photos, strict=True)
            ]
        )
    return torch.stack(every), torch.tensor(agreeing)


def confusions_of(matcher: Matcher, sites: Sequence[Site]) -> tuple[Confusion, Confusion]:
    """Match all photographs of all places; a photograph is never matched with itself.

    Returns:
        By all correspondences, and by those that agree on one homography.

    Raises:
        ValueError: There is but one place, or one has no two photographs.
    """
    if len(sites) < 2 or min(len(site.photos) for site in sites) < 2:
        raise ValueError(
            "A confusion table needs two places, and two photographs of each: give --synthetic 6."
        )
    every, agreeing = matches_of(matcher, [photo for site in sites for photo in site.photos])
    return _confusion(every, sites), _confusion(agreeing, sites)


def _confusion(matches: Tensor, sites: Sequence[Site]) -> Confusion:
    owner = torch.tensor([k for k, site in enumerate(sites) for _ in site.photos])
    other = ~torch.eye(len(owner), dtype=torch.bool)
    numbers = range(len(sites))

    def block(row: int, column: int) -> Tensor:
        both = (owner[:, None] == row) & (owner[None, :] == column) & other
        return matches[both]

    def foreign(k: int) -> Tensor:
        return matches[(owner[:, None] == k) != (owner[None, :] == k)]

    return Confusion(
        scenes=tuple(site.name for site in sites),
        means=tuple(tuple(float(block(r, c).double().mean()) for c in numbers) for r in numbers),
        least_true=tuple(int(block(k, k).min()) for k in numbers),
        most_wrong=tuple(int(foreign(k).max()) for k in numbers),
    )


def scenes_to_match(folder: Path | None, *, demo: bool, synthetic: int) -> list[Scene]:
    """The demo's, every scene of the folder, and synthetic ones."""
    paths = sorted(folder.glob("*/target")) if folder is not None else []
    found = [*(demo_scenes() if demo else ()), *(load_scene(path.parent) for path in paths)]
    return found + synthetic_scenes(synthetic)


def markdown(found: Confusion) -> str:
    """Means, and the two counts that decide."""
    head = ["", *found.scenes, "least true", "most wrong"]
    rows = [
        [name, *(f"{mean:.0f}" for mean in row), str(true), str(wrong)]
        for name, row, true, wrong in zip(
            found.scenes, found.means, found.least_true, found.most_wrong, strict=True
        )
    ]
    return markdown_table(head, rows)


def record_rows(found: Confusion, agreeing: Confusion, *, device: str, path: Path) -> None:
    """Keep the share of scenes told apart, and the mean matches of true and of wrong pairs."""
    details: dict[str, Any] = {"device": device, "path": path}
    for suffix, table in (("", found), (".agreeing", agreeing)):
        right = 1 - len(table.confused_on_average) / len(table.scenes)
        record(f"rank.scenes_told_apart{suffix}", right, "share", target=1.0, **details)
        true, wrong = table.averages
        peer: dict[str, Any] = {"peer": "pairs of different scenes", "peer_value": wrong}
        record(f"rank.matches_true_pairs{suffix}", true, "matches", **peer, **details)


@click.command(
    cls=OfPhotographs,
    free={"working_px"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--matcher", "name", default="nano", show_default=True, help="Or outdoor, a file.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--scenes",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of scenes; a truth is not needed.",
)
@click.option("--demo/--no-demo", default=True, help="The demo's two scenes too.")
@click.option("--synthetic", type=click.IntRange(min=0), default=6, show_default=True)
@click.option(
    "--working-px",
    type=click.IntRange(min=64),
    help="Long side that photographs are matched at, else the matcher's own.",
)
@click.option("--rows", type=click.Path(dir_okay=False, path_type=Path), default=ROWS)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def main(
    name: str,
    device: str,
    folder: Path | None,
    demo: bool,
    synthetic: int,
    working_px: int | None,
    rows: Path,
    as_json: bool,
) -> None:
    """Match photographs of the same and of different scenes, and print the confusion table.

    \b
        python -m benchmarks.quality.confusion --scenes ../shared/scenes
    A cell is the mean number of correspondences of a photograph of its row's scene with one of
    its column's. A scene with a single reference is matched with its true target; scenes that
    share a photograph count as one. The second table counts only correspondences that one
    homography explains: what matches by chance seldom moves alike.
    """
    try:
        matcher = loftr(name, device)
        matcher.working_px = working_px or matcher.working_px
        sites = sites_of(scenes_to_match(folder, demo=demo, synthetic=synthetic))
        found, agreeing = confusions_of(matcher, sites)
    except (RealFillError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    # Another size is a trial: rows are of the matcher as it is used.
    if working_px is None:
        record_rows(found, agreeing, device=device_name(device), path=rows)
    if as_json:
        report = _report(found) | {"agreeing": _report(agreeing)}
        click.echo(json.dumps(report, indent=2))
        return
    for title, table in (
        ("All correspondences", found),
        ("Those that agree on one homography", agreeing),
    ):
        true, wrong = table.averages
        click.echo(f"{title}: true pairs {true:.0f} on average, wrong ones {wrong:.0f}.\n")
        click.echo(markdown(table))
        for label, names in (
            ("on average", table.confused_on_average),
            ("in their worst pairs", table.confused),
        ):
            click.echo(f"Confused {label}: {', '.join(names) or 'none'}")


def _report(found: Confusion) -> dict[str, Any]:
    return asdict(found) | {
        "confused": found.confused,
        "confused_on_average": found.confused_on_average,
    }


if __name__ == "__main__":
    main()
