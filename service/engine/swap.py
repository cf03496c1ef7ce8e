"""Put one scene's adapter into the weights of the resident U-Net, entirely or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kernels.merge_lora import prepared_merge
from realfill.adapter import Adapter
from realfill.base import target_layers
from service.engine.staging import StagedAdapter, as_laid_out, as_matrix, stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Writing:
    """What writing an adapter into the weights takes, found once.

    Attributes:
        addresses: Of all target weights when it was found; elsewhere it means nothing.
        plain: Weights that the adapter leaves as they are, as matrices.
        pristine: Pristine copies of those.
        merge: Fuses the adapter's factors into the other weights, given its scale.
    """

    addresses: list[int]
    plain: list[Tensor]
    pristine: list[Tensor]
    merge: Callable[[float], None] | None


class Swapper:
    """Keeps pristine copies of a U-Net's target weights and fuses adapters from them.

    Fused weights always come from the pristine ones, so nothing drifts and a bad adapter leaves no
    trace. What the weights hold is remembered by digest, together with each tensor's address and
    version counter, so that a write from elsewhere is noticed before the next batch.

    Args:
        unet: The resident model; its target weights belong to the swapper from now on.
        targets: Names of the modules that adapters may change, as path ends ("to_q", "to_out.0").
        prepare_merge: Makes what fuses factors into weights.

    Attributes:
        writes: How often weights were written.

    Raises:
        ValueError: No linear or convolutional layer of the U-Net matches.
    """

    def __init__(
        self,
        unet: nn.Module,
        targets: Iterable[str],
        prepare_merge: Callable[..., Callable[[float], None]] = prepared_merge,
    ) -> None:
        endings = tuple(targets)
        self._prepare_merge = prepare_merge
        self._modules = target_layers(unet, endings)
        if not self._modules:
            raise ValueError(f"no layer of the U-Net is named like any of {endings}")
        self._pristine = {
            path: as_matrix(module.weight.detach()).clone()
            for path, module in self._modules.items()
        }
        self._writings: WeakKeyDictionary[StagedAdapter, Writing] = WeakKeyDictionary()
        self._restoring: Writing | None = None
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
    def torn(self) -> bool:
        """Whether a swap failed half-way and could not be undone; the next one repairs it."""
        return self._torn

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

    def prepare(self, staged: StagedAdapter) -> None:
        """Find out what writing a staged adapter takes, so that the first swap to it is quick too.

        It may be called from any thread. With a hundred layers it takes milliseconds, the swap less
        than one.
        """
        self._writing(staged)

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
        writing = self._writing(staged)
        with torch.no_grad():
            if writing.plain:
                torch._foreach_copy_(writing.plain, writing.pristine)
            if writing.merge is not None and staged is not None:
                writing.merge(staged.scale)

    def _writing(self, staged: StagedAdapter | None) -> Writing:
        """As it was found before, unless a weight lies elsewhere now."""
        known = self._restoring if staged is None else self._writings.get(staged)
        if known is not None and known.addresses == self._read_addresses():
            return known
        found = self._find_writing(staged)
        if staged is None:
            self._restoring = found
        else:
            self._writings[staged] = found
        return found

    def _find_writing(self, staged: StagedAdapter | None) -> Writing:
        factors = {} if staged is None else staged.factors
        plain = [path for path in self._modules if path not in factors]
        merge = None
        if staged is not None:
            merge = self._prepare_merge(
                [self._weight(path) for path in factors],
                [self._pristine[path] for path in factors],
                [as_laid_out(self._modules[path].weight, a) for path, (a, _) in factors.items()],
                [b for _, b in factors.values()],
            )
        return Writing(
            self._read_addresses(),
            [self._weight(path) for path in plain],
            [self._pristine[path] for path in plain],
            merge,
        )

    def _read_addresses(self) -> list[int]:
        return [module.weight.data_ptr() for module in self._modules.values()]
