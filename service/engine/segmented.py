"""Low-rank terms per sample beside the base's weights: many scenes in one batch, little memory.

The way of a GPU. A batch of one scene runs on merged weights, which cost nothing per step and stay
at their addresses; a batch of several runs on the base's own weights, and every target layer adds
each sample's term from the slot that its adapter has in the arena.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.segmented_lora import segmented_conv_lora_, segmented_linear, segmented_lora_
from realfill.adapter import Adapter
from service.engine.arena import TierMetrics
from service.engine.layers import Installed, install_exact, is_exact
from service.engine.slots import RankClass, Slot, padded
from service.engine.staging import StagedAdapter, pinned, stage
from service.engine.swap import Swapper
from service.engine.weights import Part, SpoiltWeights, divided


@dataclass
class Slots:
    """Which slot each sample of the batch uses; shared by all layers.

    Attributes:
        of: For each rank class in the batch, the slot of each sample, -1 for none. [N], int64
    """

    of: list[tuple[RankClass, Tensor]] = field(default_factory=list)


@dataclass
class LowRankLayer:
    """A target layer that adds every sample's own low-rank term.

    Attributes:
        plain: The layer's way without a term.
        fused: Whether a linear layer and the terms of the first rank class are one operation.
    """

    path: str
    module: nn.Linear | nn.Conv2d
    plain: object
    slots: Slots
    fused: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's outcome. [N, ...]"""
        classes = self.slots.of
        # Layers of the timestep see one row per sample, too few for a tile of a sample's own.
        if classes and self.fused and isinstance(self.module, nn.Linear) and x.dim() == 3:
            (first, rows), *classes = classes
            factors = first.factors(self.path)
            weights = (self.module.weight, self.module.bias)
            out = segmented_linear(x, *weights, *factors, rows, first.scales)
        else:
            out = self.plain(x)  # type: ignore[operator]
        for rank_class, rows in classes:
            self._add_terms_(out, x, rank_class, rows)
        return out

    def _add_terms_(self, out: Tensor, x: Tensor, rank_class: RankClass, rows: Tensor) -> None:
        """Add the terms of one rank class to what the layer gave without them."""
        factors = rank_class.factors(self.path)
        if isinstance(self.module, nn.Conv2d):
            segmented_conv_lora_(
                out, x, *factors, rows, rank_class.scales,
                kernel_size=_pair(self.module.kernel_size),
                stride=_pair(self.module.stride),
                padding=_pair(self.module.padding),
            )  # fmt: skip
            return
        if x.dim() == 2:
            out, x = out[:, None], x[:, None]
        segmented_lora_(out, x, *factors, rows, rank_class.scales)


class SegmentedWeights:
    """Keeps adapters in an arena on the device, merged or beside the weights as a batch asks.

    Args:
        unet: The resident model.
        targets: Names of the modules that adapters may change, as path ends.
        budget_bytes: For the arena. The first rank class takes half of it, the next half of what
            is left: adapters of one preset all share one class.
        split_from: Parts of so many samples run on merged weights, in a call of their own.
        products: What layers multiply in on a CPU; low-rank terms are added in the base's type.
    """

    name = "segmented"

    def __init__(
        self,
        unet: nn.Module,
        targets: Iterable[str],
        *,
        budget_bytes: int,
        split_from: int | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        self._swapper = Swapper(unet, targets)
        self._modules = self._swapper.modules
        self._left_bytes = budget_bytes
        self._split_from = split_from
        self._classes: dict[int, RankClass] = {}
        self._class_of: dict[str, RankClass] = {}
        self._lock = threading.Lock()
        self._slots = Slots()
        self._current: tuple[object, ...] = ()
        self._composed: tuple[Slot | None, ...] = ()
        self._rows_of: dict[tuple[int, int], Tensor] = {}
        self._installed = self._install(unet, products)
        self.writes = 0

    def _install(self, unet: nn.Module, products: torch.dtype) -> Installed:
        weight = next(iter(self._modules.values())).weight
        exact = is_exact(weight.device, weight.dtype)
        installed = install_exact(unet, products) if exact else Installed()
        for path, module in self._modules.items():
            layer = LowRankLayer(path, module, module.forward, self._slots, fused=weight.is_cuda)
            installed.install(module, layer)
        return installed

    @property
    def programs(self) -> int:
        """None: layers are called one by one, or captured by buckets."""
        return 0

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that adapters may change."""
        return self._swapper.module_paths

    def take(self, digest: str, adapter: Adapter, *, wait: bool = True) -> bool:
        """Copy an adapter into the arena, or find it there, and pin it; see ``Weights``."""
        return self._take(digest, adapter, pin=True, wait=wait)

    def bring(self, digest: str, adapter: Adapter, spare: Collection[str] = ()) -> None:
        """Copy an adapter into the arena for later; see ``Weights``."""
        self._take(digest, adapter, pin=False, wait=True, spare=spare)

    def give_back(self, digest: str) -> None:
        """Unpin an adapter."""
        self._class_of[digest].tier.give_back(digest)

    def forget(self, digest: str) -> bool:
        """Drop an adapter from the arena; see ``Weights``."""
        here = self._class_of.get(digest)
        return here is None or here.tier.drop(digest)

    def settle(self) -> None:
        """Write the base where the weights still hold an adapter that left the arena."""
        arena = self._arena()
        if any(slot is not None and slot.staged.digest not in arena for slot in self._composed):
            # Its copies go with the last who names it.
            self._compose_anew()
        if self._swapper.torn:
            # The next batch mends them, or fails alone.
            return
        merged = self._swapper.digest
        if merged is not None and merged not in arena:
            self._compose_anew()
            self._swapper.hold(None)

    def traces(self) -> set[str]:
        """Digests in the arena, and of what is merged."""
        merged = None if self._swapper.torn else self._swapper.digest
        return self._arena() | ({merged} if merged is not None else set())

    def _arena(self) -> set[str]:
        kinds = list(self._classes.values())
        return {digest for kind in kinds for digest in kind.tier.digests()}

    def batches(self, parts: Sequence[Part]) -> list[list[int]]:
        """One call for all parts, but those that are large enough for a call of their own."""
        return divided(parts, self._split_from)

    @property
    def mode(self) -> tuple[int, ...]:
        """Ranks of the classes that samples of the batch have slots in."""
        return tuple(rank_class.rank for rank_class, _ in self._slots.of)

    def reserve(self, rank: int) -> tuple[int, ...]:
        """Allocate the class of a rank; see ``Weights``."""
        return (self._class_for(rank).rank,)

    def rehearse(self, mode: tuple[int, ...], room: int) -> None:
        """The base's weights, and slots of which no sample has one; see ``Weights``."""
        self._compose_anew()
        self._swapper.hold(None)
        self._slots.of = [
            (self._classes[rank], self._rows(self._classes[rank], [-1] * room)) for rank in mode
        ]

    def apply(self, parts: Sequence[Part], room: int | None = None) -> None:
        """Merge the one adapter of a batch, or name every sample's slot; see ``Weights``."""
        slots = [None if part.digest is None else self._held(part.digest) for part in parts]
        alone = len(parts) == 1
        merged = slots[0].staged if alone and slots[0] is not None else None
        if not self._swapper.is_sound():
            # Nothing that was made by them counts as made.
            self._compose_anew()
            self._swapper.commit(None)
            raise SpoiltWeights(
                "weights of the U-Net were written from elsewhere; what they drew was dropped, "
                "send the request again"
            )
        # Slots are part of it: an adapter may have left the arena and come back elsewhere.
        wanted = (tuple(parts), tuple(slots), room)
        if wanted != self._current:
            # First: what fails half-way is composed of nothing that could be gone on with.
            self._compose_anew()
            self._hold(merged)
            self._slots.of = [] if alone else self._slots_of(parts, slots, room)
            self._current, self._composed = wanted, tuple(slots)
            self.writes += 1

    def _hold(self, merged: StagedAdapter | None) -> None:
        try:
            self._swapper.hold(merged)
        except Exception:
            # It went back to an adapter whose slot may be another one's by now.
            if not self._swapper.torn:
                self._swapper.hold(None)
            raise

    def _compose_anew(self) -> None:
        """Take nothing of how the network is composed for known."""
        self._current, self._composed, self._slots.of = (), (), []

    @property
    def drawing(self) -> tuple[str | None, ...]:
        """What is merged, or as the slots call their adapters; see ``Weights``."""
        if len(self._composed) == 1:
            return (self._swapper.digest,)
        return tuple(None if slot is None else slot.staged.digest for slot in self._composed)

    def conditioned(self, digest: str | None, timesteps: Tensor, prompt: Tensor) -> None:
        """Nothing; buckets project prompts."""

    def tiers(self) -> Mapping[str, TierMetrics]:
        """The arena, under "device", all rank classes together."""
        metrics = [rank_class.tier.metrics() for rank_class in list(self._classes.values())]
        names = TierMetrics.__dataclass_fields__
        return {"device": TierMetrics(**{n: sum(getattr(m, n) for m in metrics) for n in names})}

    def release(self) -> None:
        """Leave the base's weights and layers as they were."""
        self._compose_anew()
        self._installed.release()
        self._swapper.hold(None)
        self._classes.clear()
        self._class_of.clear()

    def _take(
        self,
        digest: str,
        adapter: Adapter,
        *,
        pin: bool,
        wait: bool,
        spare: Collection[str] = (),
    ) -> bool:
        here, staged = self._class_of.get(digest), None
        if here is None:
            staged = stage(self._modules, digest, adapter)
            here = self._class_for(staged.rank)
            self._class_of[digest] = here
        kept = here

        def make() -> Slot:
            factors = staged or stage(self._modules, digest, adapter)
            return kept.put(factors, self._swapper.prepare)

        taken = kept.tier.take(digest, kept.slot_bytes, make, pin=pin, wait=wait, spare=spare)
        return taken is not None

    def _class_for(self, rank: int) -> RankClass:
        wide = padded(rank)
        with self._lock:
            if wide not in self._classes:
                self._left_bytes //= 2
                self._classes[wide] = RankClass(self._modules, wide, self._left_bytes)
            return self._classes[wide]

    def _slots_of(
        self, parts: Sequence[Part], slots: Sequence[Slot | None], room: int | None
    ) -> list[tuple[RankClass, Tensor]]:
        """For each rank class in a batch, in rising order, the slot of every place."""
        present = {s.rank_class.rank: s.rank_class for s in slots if s is not None}
        found = []
        for _, rank_class in sorted(present.items()):
            rows: list[int] = []
            for part, slot in zip(parts, slots, strict=True):
                mine = slot is not None and slot.rank_class is rank_class
                rows += [slot.row if mine and slot is not None else -1] * part.count
            rows += [-1] * ((room or len(rows)) - len(rows))
            found.append((rank_class, self._rows(rank_class, rows)))
        return found

    def _rows(self, rank_class: RankClass, rows: list[int]) -> Tensor:
        """Slots on the device, for one class and number always in the same memory."""
        key = (rank_class.rank, len(rows))
        if key not in self._rows_of:
            device = rank_class.scales.device
            self._rows_of[key] = torch.empty(len(rows), dtype=torch.int64, device=device)
        held = self._rows_of[key]
        held.copy_(pinned(torch.tensor(rows), held.device), non_blocking=True)
        return held

    def _held(self, digest: str) -> Slot:
        try:
            return self._class_of[digest].tier[digest]
        except KeyError as error:
            raise RuntimeError(f"adapter {digest} is not ready; take it before its use") from error


def _pair(sides: object) -> tuple[int, int]:
    assert isinstance(sides, tuple)
    return (int(sides[0]), int(sides[1]))
