"""Put one scene's adapter into the weights of the resident U-Net, entirely or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from kernels.merge_lora import merge_lora_
from realfill.base import target_layers
from realfill.capsule import Adapter
from service.engine.staging import StagedAdapter, as_laid_out, as_matrix, stage

logger = logging.getLogger(__name__)


class Swapper:
    """Keeps pristine copies of a U-Net's target weights and fuses adapters from them.

    Fused weights always come from the pristine ones, so nothing drifts and a bad adapter leaves no
    trace. What the weights hold is remembered by digest, together with each tensor's address and
    version counter, so that a write from elsewhere is noticed before the next batch.

    Args:
        unet: The resident model; its target weights belong to the swapper from now on.
        targets: Names of the modules that adapters may change, as path ends ("to_q", "to_out.0").
        merge: What fuses factors into weights.

    Attributes:
        writes: How often weights were written.

    Raises:
        ValueError: No linear or convolutional layer of the U-Net matches.
    """

    def __init__(
        self,
        unet: nn.Module,
        targets: Iterable[str],
        merge: Callable[..., None] = merge_lora_,
    ) -> None:
        endings = tuple(targets)
        self._merge = merge
        self._modules = target_layers(unet, endings)
        if not self._modules:
            raise ValueError(f"no layer of the U-Net is named like any of {endings}")
        self._pristine = {
            path: as_matrix(module.weight.detach()).clone()
            for path, module in self._modules.items()
        }
        self._current: StagedAdapter | None = None
        self._torn = False
        self._marks = self._read_marks()
        self.writes = 0

    @property
    def digest(self) -> str | None:
        """Digest of the adapter in the weights, None for the base alone.

        Raises:
            RuntimeError: A swap failed half-way and could not be undone.
        """
        if self._torn:
            raise RuntimeError(
                "the weights hold parts of two adapters; apply an adapter or None to repair them"
            )
        return None if self._current is None else self._current.digest

    @property
    def module_paths(self) -> tuple[str, ...]:
        """Paths of the modules that adapters may change."""
        return tuple(self._modules)

    @property
    def modules(self) -> Mapping[str, nn.Linear | nn.Conv2d]:
        """The same with their modules."""
        return self._modules

    def apply(self, digest: str | None, adapter: Adapter | None) -> bool:
        """Make the weights hold exactly this adapter, or none.

        Args:
            digest: Of the capsule; None exactly where `adapter` is None.
            adapter: Factors by module path; None restores the base.

        Returns:
            Whether weights were written; they are not if they already hold this adapter.

        Raises:
            AdapterMismatch: A path or a shape is not the U-Net's; the weights are as before.
            InvalidCapsule: A value is not finite, or too large for the weights' type; likewise.
        """
        if (digest is None) != (adapter is None):
            raise ValueError(f"digest is {digest!r}, adapter {adapter!r}; pass both or neither")
        if self._holds(digest, None if adapter is None else adapter.scale):
            return False
        staged = None
        if digest is not None and adapter is not None:
            staged = self.stage(digest, adapter)
        self.commit(staged)
        return True

    def stage(self, digest: str, adapter: Adapter) -> StagedAdapter:
        """Validate an adapter and bring it to the device, in one copy; no weight is touched.

        Raises:
            AdapterMismatch, InvalidCapsule: As `apply`.
        """
        return stage(self._modules, digest, adapter)

    def hold(self, staged: StagedAdapter | None) -> bool:
        """Make the weights hold a staged adapter, or the base; whether they were written."""
        digest, scale = (None, None) if staged is None else (staged.digest, staged.scale)
        if self._holds(digest, scale):
            return False
        self.commit(staged)
        return True

    def is_sound(self) -> bool:
        """Whether the weights are whole and nobody else has written to them."""
        return not self._torn and self._marks == self._read_marks()

    def commit(self, staged: StagedAdapter | None) -> None:
        """Write a staged adapter into the weights, or the base where it is None.

        If that fails, the weights are put back as they were, and the failure is raised.
        """
        self.writes += 1
        previous = self._current
        was_torn, self._torn = self._torn, True
        try:
            self._write(staged)
        except Exception:
            if not was_torn:
                self._write(previous)
                self._marks = self._read_marks()
                self._torn = False
            raise
        self._current = staged
        self._marks = self._read_marks()
        self._torn = False

    def verify(self, digest: str | None, scale: float | None = None) -> None:
        """Make sure that the next batch will be drawn with this adapter and no other.

        Args:
            digest: What the weights shall hold, None for the base alone.
            scale: The adapter's scale, None for the base alone.

        Raises:
            RuntimeError: They hold something else, or were written from elsewhere.
        """
        if not self._holds(digest, scale):
            held = "parts of two adapters" if self._torn else (self.digest or "the base alone")
            raise RuntimeError(
                f"the U-Net was to hold adapter {digest or 'none'}, but holds {held} or was "
                "written from elsewhere; apply it again"
            )

    def _holds(self, digest: str | None, scale: float | None) -> bool:
        """Whether the weights hold this adapter and nobody else has written to them."""
        if self._torn:
            return False
        current = self._current
        held = (None, None) if current is None else (current.digest, current.scale)
        if held != (digest, scale):
            return False
        if self._marks != self._read_marks():
            logger.error("weights of the U-Net were written by something other than the swapper")
            return False
        return True

    def _read_marks(self) -> list[tuple[int, int]]:
        """Address and version counter of every target weight, without asking the device."""
        weights = [module.weight for module in self._modules.values()]
        return [(weight.data_ptr(), weight._version) for weight in weights]

    def _weight(self, path: str) -> Tensor:
        return as_matrix(self._modules[path].weight.detach())

    def _write(self, staged: StagedAdapter | None) -> None:
        """Every target weight, from its pristine copy."""
        factors = {} if staged is None else staged.factors
        plain = [path for path in self._modules if path not in factors]
        with torch.no_grad():
            if plain:
                torch._foreach_copy_(
                    [self._weight(path) for path in plain],
                    [self._pristine[path] for path in plain],
                )
            if staged is not None:
                self._merge(
                    [self._weight(path) for path in factors],
                    [self._pristine[path] for path in factors],
                    [
                        as_laid_out(self._modules[path].weight, a)
                        for path, (a, _) in factors.items()
                    ],
                    [b for _, b in factors.values()],
                    staged.scale,
                )
