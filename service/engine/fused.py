"""Whole weights per scene: several adapters in one batch, each sample exactly as if it were alone.

On a CPU nothing forces weights to stay at one address. So each scene that is in use has its target
weights fused once and kept; swapping is then a matter of naming another set, and a batch of many
scenes runs every layer part by part with the weights of that part (``service.engine.program``). A
sample sees the very products that it would see alone, hence the very same bits.

A set of ``nano`` takes 42 to 47 MB, and half of that in bfloat16. Low-rank terms beside the base's
weights would take less memory, but more time in a batch of sixteen scenes (rows
``engine.mixed_step_ms.segmented`` and without the suffix), and round differently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kernels.merge_lora import merge_lora_
from realfill.adapter import Adapter
from realfill.base import target_layers
from service.engine.arena import Tier, TierMetrics
from service.engine.conditioning import Conditioned, Joined, conditioning_of
from service.engine.fusion import install_fusion
from service.engine.layers import Exact, Installed, Packed, exact_layers
from service.engine.parts import Parting, Parts
from service.engine.program import (
    Given,
    GivenLayer,
    JoinedLayers,
    PartedNetwork,
    Programs,
    are_alike,
    layers_that_read_alike,
)
from service.engine.staging import StagedAdapter, as_matrix, stage
from service.engine.weights import Part, SpoiltWeights, divided

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class FusedSet:
    """The target weights of one scene.

    Attributes:
        digest: Of the capsule.
        weights: As the layers compute with them, in their order; None for layers that no adapter
            changes.
    """

    digest: str
    weights: list[Packed | None]

    def is_sound(self) -> bool:
        """Whether nobody has written to the weights."""
        return not any(weight.versions for weight in self.weights if weight is not None)


class FusedWeights:
    """Keeps sets of fused weights within a budget and lets each part of a batch use its own.

    Args:
        unet: The resident model in float32 on a CPU; its layers compute in our way until
            ``release``.
        targets: Names of the modules that adapters may change, as path ends.
        budget_bytes: For the sets. One set may exceed it.
        split_from: Parts of so many samples run in a call of their own.
        products: What its layers multiply in; sets are kept in it.
    """

    name = "fused"

    def __init__(
        self,
        unet: nn.Module,
        targets: Iterable[str],
        *,
        budget_bytes: int,
        split_from: int | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        endings = tuple(targets)
        self._modules = target_layers(unet, endings)
        if not self._modules:
            raise ValueError(f"no layer of the U-Net is named like any of {endings}")
        if not all(module.weight.is_contiguous() for module in self._modules.values()):
            raise ValueError("a target weight of the U-Net is not contiguous; load the base anew")
        self._pristine = {
            path: module.weight.detach().clone() for path, module in self._modules.items()
        }
        self._split_from = split_from
        self._tier: Tier[FusedSet] = Tier(budget_bytes)
        self._parting = Parting()
        self._composed: tuple[str | None, ...] = ()
        self._products = products
        self._layers = self._grouped(unet)
        self._joined: list[JoinedLayers] = []
        self._installed = self._install(unet)
        self._marks = self._read_marks()
        self.writes = 0

    def _grouped(self, unet: nn.Module) -> list[Exact]:
        """All layers, those that read alike as one; none holds targets and others."""
        targets = {id(module) for module in self._modules.values()}
        layers: list[Exact] = []
        seen: set[int] = set()
        for group in layers_that_read_alike(unet):
            if len({id(module) in targets for module in group}) == 1 and are_alike(group):
                layers.append(self._exact(*group))
                seen.update(map(id, group))
        alone = [module for module in exact_layers(unet) if id(module) not in seen]
        return [*layers, *map(self._exact, alone)]

    def _exact(self, module: nn.Linear | nn.Conv2d, *beside: nn.Linear) -> Exact:
        return Exact(module, *beside, products=self._products)

    def _install(self, unet: nn.Module) -> Installed:
        installed, given = Installed(), Given()
        groups = []
        for place, exact in enumerate(self._layers):
            layer = GivenLayer(exact, given, place)
            if len(exact.modules) == 1:
                installed.install(exact.module, layer)
                continue
            groups.append(Joined(exact.modules, layer, exact.out_sizes))
            joined = JoinedLayers(layer, exact.out_sizes)
            self._joined.append(joined)
            for member, module in enumerate(exact.modules):
                installed.install(module, partial(joined.outcome, member))
        installed.methods += install_fusion(unet).methods
        conditioning = conditioning_of(unet, groups)
        if conditioning is not None:
            # Over what was installed above: programs are given the outcomes of these layers.
            conditioning.install(installed)
        programs = Programs(partial(self._by_layers, partial(type(unet).forward, unet)), given)
        self._network = PartedNetwork(programs, self._parting, self._weights_for, conditioning)
        installed.install(unet, self._network)
        return installed

    def _by_layers(
        self, forward: Callable[..., tuple[Tensor]], x: Tensor, timesteps: Tensor, prompts: Tensor
    ) -> Tensor:
        """A call of the network as it is written."""
        try:
            return forward(x, timesteps, encoder_hidden_states=prompts, return_dict=False)[0]
        finally:
            for joined in self._joined:
                joined.forget()

    def _weights_for(self, chosen: Sequence[Packed | None] | None, samples: int) -> list[Tensor]:
        """A part's weights, as the calling thread's layers want them for so many samples."""
        if chosen is None:
            chosen = [None] * len(self._layers)
        return [
            (layer.mine() if weight is None else weight).for_samples(samples)
            for layer, weight in zip(self._layers, chosen, strict=True)
        ]

    @property
    def programs(self) -> int:
        """One for batches of one scene and one for those of several, for each size of pictures."""
        return len(self._network.programs)

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that adapters may change."""
        return tuple(self._modules)

    def take(self, digest: str, adapter: Adapter, *, wait: bool = True) -> bool:
        """Fuse an adapter's set, or find it, and pin it; see ``Weights``."""
        return self._take(digest, adapter, pin=True, wait=wait)

    def bring(self, digest: str, adapter: Adapter, spare: Collection[str] = ()) -> None:
        """Fuse an adapter's set for later; see ``Weights``."""
        self._take(digest, adapter, pin=False, wait=True, spare=spare)

    def give_back(self, digest: str) -> None:
        """Unpin a set."""
        self._tier.give_back(digest)

    def forget(self, digest: str) -> bool:
        """Drop a set; see ``Weights``."""
        return self._tier.drop(digest)

    def settle(self) -> None:
        """Let go of sets that left the tier while the layers still named them."""
        if any(digest is not None and digest not in self._tier for digest in self._composed):
            self._compose(Parts(), ())

    def traces(self) -> set[str]:
        """Digests in the tier, and of what the layers name."""
        return {*self._tier.digests(), *(digest for digest in self._composed if digest)}

    def batches(self, parts: Sequence[Part]) -> list[list[int]]:
        """One call for all parts, but those that are large enough for a call of their own."""
        return divided(parts, self._split_from)

    @property
    def mode(self) -> tuple[int, ...]:
        """Nothing is ever beside the weights."""
        return ()

    def reserve(self, rank: int) -> tuple[int, ...]:
        """Sets of all ranks are alike."""
        return ()

    def rehearse(self, mode: tuple[int, ...], room: int) -> None:
        """As many parts of one sample each; see ``Weights``."""
        self._compose(Parts(tuple(range(1, room + 1)), (None,) * room), ())

    def apply(self, parts: Sequence[Part], room: int | None = None) -> None:
        """Name the set of every part; see ``Weights``. Places without a sample join the last."""
        sets = [None if part.digest is None else self._held(part.digest) for part in parts]
        self._check(sets)
        ends, end = [], 0
        for part in parts:
            end += part.count
            ends.append(end)
        ends[-1] = room or end
        weights = tuple(None if kept is None else kept.weights for kept in sets)
        named = self._parting.parts.weights
        self.writes += len(weights) != len(named) or any(
            one is not other for one, other in zip(weights, named, strict=True)
        )
        digests = tuple(None if kept is None else kept.digest for kept in sets)
        self._compose(Parts(tuple(ends), weights), digests)

    @property
    def drawing(self) -> tuple[str | None, ...]:
        """As the sets call themselves; see ``Weights``."""
        return self._composed

    def conditioned(
        self, digest: str | None, timesteps: Tensor, prompt: Tensor
    ) -> Conditioned | None:
        """By the set's weights; see ``Weights``."""
        kept = None if digest is None else self._held(digest)
        self._check([kept])
        weights = None if kept is None else kept.weights
        made = self._network.conditioned(timesteps, prompt[None], weights)
        return made and Conditioned(made.times, made.prompts[0])

    def share(self, start: int, stop: int) -> AbstractContextManager[None]:
        """Another thread that enters this computes some of the samples of the batch as composed.

        Args:
            start: The first of its samples, by their places in the batch.
            stop: Where they end.
        """
        return self._parting.by(self._parting.parts.between(start, stop))

    def _compose(self, parts: Parts, digests: tuple[str | None, ...]) -> None:
        self._parting.parts, self._composed = parts, digests

    def tiers(self) -> Mapping[str, TierMetrics]:
        """The sets, under "device": they are what is computed with."""
        return {"device": self._tier.metrics()}

    def release(self) -> None:
        """Give every layer its own way back, and drop all sets."""
        self._compose(Parts(), ())
        self._installed.release()
        self._tier.clear()

    def _take(
        self,
        digest: str,
        adapter: Adapter,
        *,
        pin: bool,
        wait: bool,
        spare: Collection[str] = (),
    ) -> bool:
        def make() -> FusedSet:
            return self._fuse(stage(self._modules, digest, adapter))

        size_bytes = self._set_bytes()
        taken = self._tier.take(digest, size_bytes, make, pin=pin, wait=wait, spare=spare)
        return taken is not None

    def _set_bytes(self) -> int:
        """Of a set in all forms in which its weights may be wanted."""
        return sum(
            layer.forms * module.weight.numel() * self._products.itemsize
            for layer in self._layers_of_targets()
            for module in layer.modules
        )

    def _layers_of_targets(self) -> list[Exact]:
        targets = {id(module) for module in self._modules.values()}
        return [layer for layer in self._layers if id(layer.module) in targets]

    @torch.no_grad()
    def _fuse(self, staged: StagedAdapter) -> FusedSet:
        """A scene's weights: one allocation for all, each layer's packed after it."""
        places = {id(module): path for path, module in self._modules.items()}
        layers = self._layers_of_targets()
        paths = [places[id(module)] for layer in layers for module in layer.modules]
        sizes = [self._pristine[path].numel() for path in paths]
        whole = torch.empty(sum(sizes))
        outs = dict(zip(paths, whole.split(sizes), strict=True))
        matrices = {
            path: out.view(as_matrix(self._pristine[path]).shape) for path, out in outs.items()
        }
        changed = [path for path in paths if path in staged.factors]
        merge_lora_(
            [matrices[path] for path in changed],
            [as_matrix(self._pristine[path]) for path in changed],
            [staged.factors[path][0] for path in changed],
            [staged.factors[path][1] for path in changed],
            staged.scale,
        )
        for path in set(paths) - set(changed):
            matrices[path].copy_(as_matrix(self._pristine[path]))
        # What is computed as one lies side by side.
        spans = [sum(module.weight.numel() for module in layer.modules) for layer in layers]
        packed = {
            id(layer): layer.pack(span)
            for layer, span in zip(layers, whole.split(spans), strict=True)
        }
        return FusedSet(staged.digest, [packed.get(id(layer)) for layer in self._layers])

    def _held(self, digest: str) -> FusedSet:
        try:
            return self._tier[digest]
        except KeyError as error:
            raise RuntimeError(f"adapter {digest} is not ready; take it before its use") from error

    def _check(self, sets: Sequence[FusedSet | None]) -> None:
        """Refuse weights that somebody else has written to, and mend them."""
        spoilt = [kept for kept in sets if kept is not None and not kept.is_sound()]
        if self._marks != self._read_marks():
            with torch.no_grad():
                for path, module in self._modules.items():
                    module.weight.copy_(self._pristine[path])
            self._marks = self._read_marks()
        elif not spoilt:
            return
        self._compose(Parts(), ())
        logger.error("weights of the U-Net were written by something other than the engine")
        for kept in spoilt:
            self._tier.expel(kept.digest)
        raise SpoiltWeights(
            "weights of the U-Net were written from elsewhere; what they drew was dropped, "
            "send the request again"
        )

    def _read_marks(self) -> list[tuple[int, int]]:
        """Address and version counter of every target weight."""
        weights = [module.weight for module in self._modules.values()]
        return [(weight.data_ptr(), weight._version) for weight in weights]
