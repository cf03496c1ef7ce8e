"""What is asked of the server and which aliases move, without end, all from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.load.plan import popularity


@dataclass(frozen=True)
class Shape:
    """Of the requests.

    Attributes:
        scenes: Names, the most popular first.
        zipf_s: 0 for equal popularity, 1 for the classical law.
        seeds: First seeds that requests choose from; few, so that pictures repeat.
        max_candidates, max_steps: Largest of each; both are drawn evenly from 1 on.
        cancel_share: Share of requests whose client leaves.
        image_share: Share of requests that want the best candidate as an image, not JSON.
    """

    scenes: Sequence[str]
    zipf_s: float = 1.0
    seeds: int = 3
    max_candidates: int = 6
    max_steps: int = 4
    cancel_share: float = 0.1
    image_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.scenes:
            raise ValueError("No scene to ask for: name at least one.")
        if min(self.seeds, self.max_candidates, self.max_steps) < 1:
            raise ValueError("Seeds, candidates and steps begin at 1: raise the smallest of them.")


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        index: Its number in the run.
        scene: Name; the version is that of its alias where ``digest`` is None.
        digest: The version to ask for, whatever the alias points to.
        seed: Of the first candidate.
        cancel_after: When the client leaves, as a share of a typical latency; None to stay.
        as_image: Whether it wants the best candidate as an image.
    """

    index: int
    scene: str
    seed: int
    candidates: int
    steps: int
    digest: str | None = None
    cancel_after: float | None = None
    as_image: bool = False

    @property
    def reference(self) -> str:
        """What the path of the request names."""
        return self.scene if self.digest is None else f"sha256:{self.digest}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the candidates."""
        return tuple(range(self.seed, self.seed + self.candidates))


@dataclass(frozen=True)
class Move:
    """An alias goes to another version.

    Attributes:
        turn: How many versions further it goes, in the circle of the scene's versions.
        over_http: Through the server, else straight through the registry, as another process would.
    """

    scene: str
    turn: int
    over_http: bool


def asks(shape: Shape, seed: int) -> Iterator[Ask]:
    """Requests without end; the same seed gives the same ones."""
    draw = random.Random(f"asks {seed}")
    weights = popularity(len(shape.scenes), shape.zipf_s)
    index = 0
    while True:
        leaves = draw.random() < shape.cancel_share
        moment = draw.uniform(0, 1.5)
        yield Ask(
            index=index,
            scene=draw.choices(shape.scenes, weights)[0],
            seed=draw.randrange(shape.seeds),
            candidates=draw.randint(1, shape.max_candidates),
            steps=draw.randint(1, shape.max_steps),
            cancel_after=moment if leaves else None,
            as_image=draw.random() < shape.image_share,
        )
        index += 1


def moves(versions: Mapping[str, int], seed: int) -> Iterator[Move]:
    """Alias moves without end, of the scenes that have several versions; none where none has.

    Args:
        versions: How many versions each scene has.
        seed: Of the draws.
    """
    draw = random.Random(f"moves {seed}")
    movable = [scene for scene, count in versions.items() if count > 1]
    while movable:
        scene = draw.choice(movable)
        turn = draw.randint(1, versions[scene] - 1)
        yield Move(scene, turn, over_http=draw.random() < 0.5)
