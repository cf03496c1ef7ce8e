"""How the samples of one batch come to their scenes' adapters: what every way has to offer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from realfill.adapter import Adapter
from service.engine.arena import TierMetrics
from service.engine.conditioning import Conditioned


class SpoiltWeights(RuntimeError):
    """Somebody else wrote to the weights: what they drew since the last check must be dropped."""


@dataclass(frozen=True)
class Part:
    """Consecutive samples of a batch that are drawn with one adapter.

    Attributes:
        digest: Of the capsule; None for the base alone.
        count: Samples.
    """

    digest: str | None
    count: int


class Weights(Protocol):
    """Adapters that lie ready on the device, and their application to parts of a batch.

    ``take``, ``bring`` and ``forget`` may be called from any thread; the rest is the lane's.

    Attributes:
        name: For records: fused or segmented.
        writes: How often the network was given another composition of adapters.
    """

    name: str
    writes: int

    @property
    def programs(self) -> int:
        """Programs that were made of the network so far."""
        ...

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that adapters may change."""
        ...

    def take(self, digest: str, adapter: Adapter, *, wait: bool = True) -> bool:
        """Make an adapter ready and keep it so until ``give_back``.

        Returns:
            False where what jobs need now leaves no room for it, or where another thread is making
            it ready and it shall not be waited for.

        Raises:
            AdapterMismatch, InvalidCapsule: The adapter cannot be used; nothing else is touched.
        """
        ...

    def bring(self, digest: str, adapter: Adapter, spare: Collection[str] = ()) -> None:
        """Make an adapter ready for a job that will come, if there is room; errors as ``take``.

        Args:
            spare: What must not make room for it, because jobs before it wait for that.
        """
        ...

    def give_back(self, digest: str) -> None:
        """One job needs the adapter no longer."""
        ...

    def forget(self, digest: str) -> bool:
        """Keep nothing of an adapter; False where it is needed or being made ready just now."""
        ...

    def settle(self) -> None:
        """Leave nothing of forgotten adapters in what the network is composed of."""
        ...

    def traces(self) -> set[str]:
        """Digests of all adapters of which the device holds anything."""
        ...

    def batches(self, parts: Sequence[Part]) -> list[list[int]]:
        """Divide parts, by their places, into those that run in one call."""
        ...

    @property
    def mode(self) -> tuple[int, ...]:
        """Rank classes beside the weights as they are composed; none where those are merged."""
        ...

    def reserve(self, rank: int) -> tuple[int, ...]:
        """Make room for adapters of a rank, and name the mode of batches of them."""
        ...

    def rehearse(self, mode: tuple[int, ...], room: int) -> None:
        """Compose the network as for a batch of several scenes, none of whose samples has one."""
        ...

    def apply(self, parts: Sequence[Part], room: int | None = None) -> None:
        """Compose the network for a batch; every digest in it must have been taken.

        Args:
            parts: Of the batch.
            room: Samples that the call is made for, where that is more than there are.

        Raises:
            SpoiltWeights: Weights were written from elsewhere. They are sound again afterwards, but
                this batch must not be drawn.
        """
        ...

    @property
    def drawing(self) -> tuple[str | None, ...]:
        """Digest of every part of the batch, told by what the network is composed of."""
        ...

    def conditioned(
        self, digest: str | None, timesteps: Tensor, prompt: Tensor
    ) -> Conditioned | None:
        """What the network makes of a job's timesteps and prompt alone, to be told to it by steps.

        Args:
            digest: Of the adapter, which must have been taken; None for the base alone.
            timesteps: Of all steps. [S]
            prompt: [L, D]

        Returns:
            None where the network takes timesteps and prompts as they are.

        Raises:
            SpoiltWeights: As ``apply``.
        """
        ...

    def tiers(self) -> Mapping[str, TierMetrics]:
        """What lies ready, by the tier's name."""
        ...

    def release(self) -> None:
        """Leave the network as it was before."""
        ...


def divided(parts: Sequence[Part], split_from: int | None) -> list[list[int]]:
    """Places of the parts that run together: the large ones each alone, the small ones in one call.

    Args:
        parts: Of one batch.
        split_from: Samples from which a part runs alone; None never.
    """
    places = range(len(parts))
    if split_from is None or len(parts) < 2:
        return [list(places)]
    alone = [place for place in places if parts[place].count >= split_from]
    together = [place for place in places if place not in alone]
    return [*([place] for place in alone), *([together] if together else [])]
