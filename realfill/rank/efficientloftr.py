"""EfficientLoFTR as a ``Matcher``, from transformers' classes and a folder of weights.

Only what decides about counts runs: the fine stages move matches and never add or drop one.

Source: Efficient LoFTR, arXiv:2403.04765.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EfficientLoFTRForKeypointMatching

from kernels.match_count import match_count
from realfill.errors import MatcherUnavailable
from realfill.rank.correspondences import (
    CELL_PX,
    Features,
    Matcher,
    Matches,
    cell_matches,
    check_images,
    check_pairs,
)
from realfill.rank.matching import weights_digest

WORKING_PX = 512
# The backbone reduces by 8, and attention aggregates 4 x 4 of its cells.
SIZE_MULTIPLE = 32
CHUNK_PAIRS = 4


class EfficientLoFTRMatcher(Matcher):
    """EfficientLoFTR's coarse path as a ``Matcher``.

    Transformers pairs images of one size only, so all are padded to one square; cells of the
    padding take part in attention, as borders do, and are never matched.
    """

    name = "efficientloftr"
    size_multiple = SIZE_MULTIPLE

    def __init__(
        self,
        model: EfficientLoFTRForKeypointMatching,
        *,
        device: torch.device,
        working_px: int = WORKING_PX,
    ) -> None:
        """Take a model, random or trained.

        Raises:
            MatcherUnavailable: It reduces by another factor than 8, or matches without softmax.
        """
        reduction = 1
        for stride in model.config.stage_stride:
            reduction *= stride
        if reduction != CELL_PX or model.config.coarse_matching_skip_softmax:
            raise MatcherUnavailable(
                f"EfficientLoFTR reduces by {reduction} (skip_softmax "
                f"{model.config.coarse_matching_skip_softmax}) and is not supported; use one that "
                f"reduces by {CELL_PX} and has its softmax"
            )
        self.device = device
        self.threshold = max(float(model.config.coarse_matching_threshold), 0.0)
        self.working_px = working_px
        self.model = model.eval().requires_grad_(False).to(device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration, working size and weights."""
        return weights_digest(
            self.model.state_dict(), [self.model.config.to_dict(), self.working_px]
        )

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """The backbone's coarse map of each image, padded to a square. [N, 1, H, W]"""
        check_images(images, SIZE_MULTIPLE)
        height, width = images.shape[-2:]
        side = self.working_px
        if max(height, width) > side:
            raise ValueError(f"image size {height}x{width}: sides must be at most {side} px")
        pixels = F.pad(images, (0, side - width, 0, side - height))
        backbone = self.model.efficientloftr.backbone
        maps = [
            backbone(part.to(self.device, torch.float32))[-1] for part in pixels.split(CHUNK_PAIRS)
        ]
        tokens = torch.cat(maps).flatten(2).transpose(1, 2)
        return Features(tokens, (height // CELL_PX, width // CELL_PX))

    @torch.no_grad()
    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """Mutual nearest cells whose dual-softmax confidence exceeds the threshold."""
        check_pairs(features0, features1)
        config = self.model.config
        threshold = self.threshold if threshold is None else threshold
        scale = 1 / (config.hidden_size * config.coarse_matching_temperature)
        tokens0 = features0.tokens.to(self.device)
        tokens1 = features1.tokens.to(self.device).expand(len(tokens0), -1, -1)
        inside0, inside1 = (self._inside(f.grid) for f in (features0, features1))
        found = []
        for part0, part1 in zip(
            tokens0.split(CHUNK_PAIRS), tokens1.split(CHUNK_PAIRS), strict=True
        ):
            met0, met1 = self._met(part0, part1)
            pair = met0[:, inside0].contiguous(), met1[:, inside1].contiguous()
            found.append(match_count(*pair, scale=scale, threshold=threshold))
        confidence, partner = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cell_matches(confidence, partner, features0, features1)

    def _met(self, tokens0: Tensor, tokens1: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after self- and cross-attention, still padded. [N, cells, C] each"""
        inner = self.model.efficientloftr
        side = self.working_px // CELL_PX
        count, _, width = tokens0.shape
        pair = torch.stack([tokens0, tokens1], 1).transpose(2, 3)
        maps = pair.reshape(count, 2, width, side, side)
        turns = [
            turn.expand(2 * count, -1, -1, -1).reshape(2 * count, -1, width)
            for turn in inner.rotary_emb(maps[:, 0])
        ]
        met = inner.local_feature_transformer(maps, position_embeddings=tuple(turns))
        return tuple(met.flatten(3).transpose(2, 3).unbind(1))

    def _inside(self, grid: tuple[int, int]) -> Tensor:
        """Places of an image's own cells among those of the square. [rows * columns]"""
        side = self.working_px // CELL_PX
        cells = torch.arange(side * side, device=self.device).view(side, side)
        return cells[: grid[0], : grid[1]].flatten()


def efficientloftr(folder: str | Path, device: str | torch.device = "cpu") -> EfficientLoFTRMatcher:
    """Load EfficientLoFTR from a folder that transformers has written.

    Raises:
        MatcherUnavailable: There is no such folder, or no such model in it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise MatcherUnavailable(
            f"EfficientLoFTR's folder {folder} holds no config.json; download the model "
            "zju-community/efficientloftr there, or use the matcher 'nano'"
        )
    try:
        model = EfficientLoFTRForKeypointMatching.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise MatcherUnavailable(
            f"EfficientLoFTR in {folder} cannot be read: {error}; download it again"
        ) from error
    return EfficientLoFTRMatcher(model, device=torch.device(device))
