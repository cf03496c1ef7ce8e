"""Correspondences between images: the ``Matcher`` protocol, and LoFTR's coarse path behind it.

LoFTR's fine stage moves matches by a few pixels but never adds or drops one, so counting needs only
the coarse path. An image's tokens up to the first cross-attention do not depend on its partner:
they are computed once.

Source: LoFTR, arXiv:2104.00680, as kornia 0.9 implements it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from kornia.feature import LoFTR
from kornia.feature.loftr.backbone import build_backbone
from kornia.feature.loftr.loftr import default_cfg
from kornia.feature.loftr.loftr_module.transformer import LocalFeatureTransformer
from kornia.feature.loftr.utils.position_encoding import PositionEncodingSine
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from realfill.errors import MatcherUnavailable

NANO_WEIGHTS = Path(__file__).parents[1] / "nano" / "weights" / "loftr.safetensors"
CELL_PX = 8
# Similarity matrices of one chunk of pairs, two of which are alive at a time.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Features:
    """What a matcher keeps of a batch of images of one size.

    Attributes:
        tokens: One row per coarse cell, in reading order. [N, L, C]
        grid: Rows and columns of cells, whose product is L.
    """

    tokens: Tensor
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Correspondences:
    """Matched points of many image pairs, ordered by pair.

    Attributes:
        points0: Columns and rows in image 0, in px. [K, 2]
        points1: Columns and rows in image 1, in px. [K, 2]
        confidence: In (0, 1]. [K]
        pair: Index of the pair each match belongs to. [K]
    """

    points0: Tensor
    points1: Tensor
    confidence: Tensor
    pair: Tensor

    def __len__(self) -> int:
        return len(self.pair)

    def where(self, keep: Tensor) -> Correspondences:
        """Only the matches that ``keep`` selects, a boolean row or indices. [K]"""
        return Correspondences(
            self.points0[keep], self.points1[keep], self.confidence[keep], self.pair[keep]
        )

    def of_pair(self, pair: int) -> Correspondences:
        """Only the matches of one pair."""
        return self.where(self.pair == pair)


class Matcher(Protocol):
    """Finds correspondences between images.

    Attributes:
        name: For records and evidence.
        size_multiple: Heights and widths must be multiples of it.
        working_px: Long side at which it matches best.
    """

    name: str
    size_multiple: int
    working_px: int

    def features(self, images: Tensor) -> Features:
        """Look at each image once; grey, in [0, 1]. [N, 1, H, W]"""
        ...

    def match(self, features0: Features, features1: Features) -> Correspondences:
        """Match image k with image k; a single image 1 is matched with every image 0."""
        ...


class CoarseLoFTR(nn.Module):
    """The part of kornia's LoFTR that decides which cells match, under kornia's tensor names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = copy.deepcopy(dict(config))
        # JSON knows no tuples, and kornia compares with one.
        self.config["resolution"] = tuple(self.config["resolution"])
        if self.config["resolution"] != (CELL_PX, 2):
            raise MatcherUnavailable(
                f"matcher resolution {self.config['resolution']} is not supported; use (8, 2)"
            )
        coarse = self.config["coarse"]
        self.backbone = build_backbone(self.config)
        for fine in ("layer2_outconv", "layer2_outconv2", "layer1_outconv", "layer1_outconv2"):
            delattr(self.backbone, fine)
        self.pos_encoding = PositionEncodingSine(
            coarse["d_model"], temp_bug_fix=coarse["temp_bug_fix"]
        )
        self.loftr_coarse = LocalFeatureTransformer(coarse)
        names = coarse["layer_names"]
        self.alone = next((k for k, name in enumerate(names) if name != "self"), len(names))
        self.threshold = max(float(self.config["match_coarse"]["thr"]), 0.0)

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens of each image before it meets another.

        Args:
            images: Grey, in [0, 1], sides multiples of 8. [N, 1, H, W]

        Returns:
            Float32 tokens in reading order. [N, L, C]
        """
        net = self.backbone
        x = net.relu(net.bn1(net.conv1(images)))
        x = net.layer3_outconv(net.layer3(net.layer2(net.layer1(x))))
        x = self.pos_encoding(x.float()).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        for layer in self.loftr_coarse.layers[: self.alone]:
            x = layer(x, x)
        return x

    def similarity(self, tokens0: Tensor, tokens1: Tensor) -> Tensor:
        """Similarity of every cell of image 0 with every cell of image 1, over the temperature.

        Args:
            tokens0: From ``tokens``. [N, L, C]
            tokens1: From ``tokens``. [N, S, C]

        Returns:
            Logits of the dual softmax. [N, L, S]
        """
        names = self.config["coarse"]["layer_names"]
        for layer, name in list(zip(self.loftr_coarse.layers, names, strict=True))[self.alone :]:
            if name == "self":
                tokens0, tokens1 = layer(tokens0, tokens0), layer(tokens1, tokens1)
            else:
                tokens0 = layer(tokens0, tokens1)
                tokens1 = layer(tokens1, tokens0)
        width = tokens0.shape[-1] ** 0.5
        logits = (tokens0.float() / width) @ (tokens1.float() / width).transpose(1, 2)
        return logits / self.config["match_coarse"]["dsmax_temperature"]


class LoFTRMatcher:
    """LoFTR's coarse path as a ``Matcher``; ``dtype`` is the backbone's, all else is float32."""

    size_multiple = CELL_PX

    def __init__(
        self,
        net: CoarseLoFTR,
        *,
        name: str,
        working_px: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.working_px = working_px
        self.device = device
        self.dtype = dtype
        self.net = net.eval().requires_grad_(False).to(device)
        self.net.backbone.to(dtype)

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Tokens of each image, including self-attention before the first meeting. [N, 1, H, W]"""
        height, width = images.shape[-2:]
        if height % CELL_PX or width % CELL_PX:
            raise ValueError(f"image size {height}x{width}: sides must be multiples of {CELL_PX}")
        pixels = images.to(self.device, self.dtype)
        # Chunks bound the memory of the widest layer, which works at half resolution.
        chunk = max(1, 2**22 // (height * width))
        tokens = [self.net.tokens(part) for part in pixels.split(chunk)]
        return Features(torch.cat(tokens), (height // CELL_PX, width // CELL_PX))

    @torch.no_grad()
    def match(self, features0: Features, features1: Features) -> Correspondences:
        """Mutual nearest cells whose dual-softmax confidence exceeds the threshold."""
        count = len(features0)
        if len(features1) not in (1, count):
            raise ValueError(f"{count} images cannot be paired with {len(features1)}; pass as many")
        tokens0, tokens1 = features0.tokens, features1.tokens.expand(count, -1, -1)
        chunk = max(1, CHUNK_BYTES // (8 * tokens0.shape[1] * tokens1.shape[1]))
        best, partner = [], []
        for part0, part1 in zip(tokens0.split(chunk), tokens1.split(chunk), strict=True):
            confidence, cell1 = _mutual(self.net.similarity(part0, part1), self.net.threshold)
            best.append(confidence)
            partner.append(cell1)
        confidence = torch.cat(best)
        # The only point at which the host waits for the device.
        pair, cell0 = torch.where(confidence > 0)
        cell1 = torch.cat(partner)[pair, cell0]
        return Correspondences(
            points0=_cell_points(cell0, features0.grid[1]),
            points1=_cell_points(cell1, features1.grid[1]),
            confidence=confidence[pair, cell0],
            pair=pair,
        )


def _mutual(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Confidence of each cell of image 0 with its mutual nearest cell, and that cell.

    Args:
        logits: Similarity over temperature; overwritten. [N, L, S]
        threshold: Confidence that a match must exceed.

    Returns:
        Confidence, 0 where the cell has no match, and the index in image 1. [N, L] each
    """
    confidence = logits.softmax(2)
    confidence *= logits.sub_(logits.logsumexp(1, keepdim=True)).exp_()
    best, partner = confidence.max(2)
    mutual = confidence.amax(1).gather(1, partner) == best
    return torch.where(mutual & (best > threshold), best, 0.0), partner


def _cell_points(cells: Tensor, columns: int) -> Tensor:
    """The pixel each cell sits on, column first. [K, 2]"""
    return torch.stack([cells % columns, cells // columns], 1).float() * CELL_PX


def loftr(
    source: str | Path = "nano",
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
) -> LoFTRMatcher:
    """Load a LoFTR matcher.

    Args:
        source: ``nano`` for the embedded weights, ``outdoor`` for the published ones from the hub,
            or a file: safetensors (its configuration under the metadata key ``config``, else the
            full one) or ``.ckpt``.
        device: Where it runs.
        dtype: Of the backbone; attention and softmax stay float32.

    Returns:
        A matcher with ``border_rm`` 0, so that matches at the border count.

    Raises:
        MatcherUnavailable: The weights cannot be had, or do not fit.
    """
    nano = str(source) == "nano"
    if str(source) == "outdoor":
        weights, config = _from_hub("outdoor")
    else:
        weights, config = _from_file(NANO_WEIGHTS if nano else Path(source))
    net = CoarseLoFTR(config)
    own = net.state_dict()
    missing = sorted(own.keys() - weights.keys())
    wrong = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if missing or wrong:
        raise MatcherUnavailable(
            f"weights {source}: {len(missing)} tensors missing and {len(wrong)} of another shape, "
            f"first {(missing + wrong)[0]}; pass LoFTR weights that fit their configuration"
        )
    net.load_state_dict({k: weights[k].to(v.dtype) for k, v in own.items()})
    return LoFTRMatcher(
        net,
        name="nano-loftr" if nano else "loftr",
        working_px=int(config.get("working_px", 512)),
        device=torch.device(device),
        dtype=dtype,
    )


def _from_file(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if not path.is_file():
        raise MatcherUnavailable(
            f"matcher weights {path} do not exist; "
            "pass a LoFTR file, or 'nano' for the embedded ones"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "null"))
                names = file.keys()  # The handle itself cannot be iterated over.
                return {name: file.get_tensor(name) for name in names}, config or default_cfg
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise MatcherUnavailable(f"matcher weights {path} cannot be read: {error}") from error
    weights: dict[str, Tensor] = kept.get("state_dict", kept)
    return {name.removeprefix("matcher."): tensor for name, tensor in weights.items()}, default_cfg


def _from_hub(name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        return dict(LoFTR(name).state_dict()), default_cfg
    except (OSError, RuntimeError, ValueError) as error:
        raise MatcherUnavailable(
            f"LoFTR weights '{name}' could not be downloaded: {error}; "
            "pass the path of a downloaded file, or 'nano'"
        ) from error
