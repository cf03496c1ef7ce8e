"""LoFTR's coarse path as a ``Matcher``.

LoFTR's fine stage moves matches by a few pixels but never adds or drops one, so counting needs only
the coarse path. An image's tokens up to the first cross-attention do not depend on its partner:
they are computed once.

Source: LoFTR, arXiv:2104.00680, as kornia 0.9 implements it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from kornia.feature import LoFTR
from kornia.feature.loftr.backbone import build_backbone
from kornia.feature.loftr.loftr import default_cfg
from kornia.feature.loftr.loftr_module.transformer import LocalFeatureTransformer
from kornia.feature.loftr.utils.position_encoding import PositionEncodingSine
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.match_count import match_count
from realfill.errors import MatcherUnavailable
from realfill.rank.correspondences import (
    CELL_PX,
    Correspondences,
    Features,
    Matcher,
    Matches,
    cell_matches,
    check_images,
    check_pairs,
)

__all__ = [
    "CELL_PX",
    "CoarseLoFTR",
    "Correspondences",
    "Features",
    "LoFTRMatcher",
    "Matcher",
    "Matches",
    "loftr",
]

NANO_WEIGHTS = Path(__file__).parents[1] / "nano" / "weights" / "loftr.safetensors"
# Cells of image 0 that the transformer works on at a time: on a CPU as many as its caches take.
CHUNK_CELLS = {"cpu": 2**12, "cuda": 2**17}
# Pixels that the backbone works on at a time; its widest layer is at half resolution.
CHUNK_PX = {"cpu": 2**18, "cuda": 2**22}


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

    def met(self, tokens0: Tensor, tokens1: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of two images after they have met, from the first cross-attention on.

        Args:
            tokens0: From ``tokens``. [N, L, C]
            tokens1: From ``tokens``. [N, S, C]

        Returns:
            Float32 tokens, of the same shapes.
        """
        names = self.config["coarse"]["layer_names"]
        for layer, name in list(zip(self.loftr_coarse.layers, names, strict=True))[self.alone :]:
            if name == "self":
                tokens0, tokens1 = layer(tokens0, tokens0), layer(tokens1, tokens1)
            else:
                tokens0 = layer(tokens0, tokens1)
                tokens1 = layer(tokens1, tokens0)
        return tokens0.float(), tokens1.float()

    @property
    def scale(self) -> float:
        """What products of tokens are multiplied with to give the logits of the dual softmax."""
        width = self.config["coarse"]["d_model"]
        return 1 / (width * self.config["match_coarse"]["dsmax_temperature"])

    def similarity(self, tokens0: Tensor, tokens1: Tensor) -> Tensor:
        """Logits of every cell of image 0 with every cell of image 1, for training. [N, L, S]"""
        tokens0, tokens1 = self.met(tokens0, tokens1)
        # In float32: bfloat16 rounds a logit of 20 to eighths.
        with torch.autocast(tokens0.device.type, enabled=False):
            return tokens0 @ tokens1.transpose(1, 2) * self.scale


class _SteadyAttention(nn.Module):
    """Linear attention whose sums over cells stay in float32, as float16 cannot hold them."""

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, **_masks: Tensor | None
    ) -> Tensor:
        """Queries [N, L, H, D] of keys and values [N, S, H, D]. [N, L, H, D]"""
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = F.elu(queries.float()) + 1, F.elu(keys.float()) + 1
            context = torch.einsum("nshd,nshv->nhdv", keys, values.float() / values.shape[1])
            normaliser = torch.einsum("nlhd,nhd->nlh", queries, keys.mean(1)) + 1e-6
            message = torch.einsum("nlhd,nhdv->nlhv", queries, context) / normaliser[..., None]
            return message.contiguous()


class LoFTRMatcher(Matcher):
    """LoFTR's coarse path as a ``Matcher``.

    With a ``dtype`` below float32, convolutions and projections run in it; the sums of attention
    and of the dual softmax stay in float32.
    """

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
        self.threshold = net.threshold
        self.net = net.eval().requires_grad_(False).to(device)
        # A layout only: weights and activations side by side by channel, which convolves faster.
        for parameter in self.net.backbone.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if dtype != torch.float32:
            for layer in self.net.loftr_coarse.layers:
                layer.attention = _SteadyAttention()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration, working size and weights."""
        return weights_digest(self.net.state_dict(), [self.net.config, self.working_px])

    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Tokens of each image, including self-attention before the first meeting. [N, 1, H, W]"""
        check_images(images, CELL_PX)
        height, width = images.shape[-2:]
        chunk = max(1, _limit(CHUNK_PX, self.device) // (height * width))
        tokens = []
        for part in images.split(chunk):
            pixels = part.to(self.device, torch.float32, memory_format=torch.channels_last)
            with self._precision():
                tokens.append(self.net.tokens(pixels).float())
        return Features(torch.cat(tokens), (height // CELL_PX, width // CELL_PX))

    @torch.no_grad()
    def compare(
        self, features0: Features, features1: Features, *, threshold: float | None = None
    ) -> Matches:
        """Mutual nearest cells whose dual-softmax confidence exceeds the threshold."""
        threshold = self.threshold if threshold is None else threshold
        check_pairs(features0, features1)
        tokens0 = features0.tokens.to(self.device)
        tokens1 = features1.tokens.to(self.device).expand(len(tokens0), -1, -1)
        chunk = max(1, _limit(CHUNK_CELLS, self.device) // tokens0.shape[1])
        found = []
        for part0, part1 in zip(tokens0.split(chunk), tokens1.split(chunk), strict=True):
            with self._precision():
                met = [tokens.to(self.dtype) for tokens in self.net.met(part0, part1)]
            found.append(match_count(*met, scale=self.net.scale, threshold=threshold))
        confidence, partner = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cell_matches(confidence, partner, features0, features1)

    @torch.no_grad()
    def compare_each(
        self, features0: Features, others: Sequence[Features], *, threshold: float | None = None
    ) -> list[Matches]:
        """In one go with as many images of one size as a chunk takes: a GPU waits for launches."""
        cells = len(features0) * features0.tokens.shape[1]
        at_once = max(1, _limit(CHUNK_CELLS, self.device) // cells)
        found: dict[int, Matches] = {}
        for places in _alike(others, at_once):
            pairs0 = _repeated(features0, len(places))
            pairs1 = _each([others[k] for k in places], len(features0))
            together = self.compare(pairs0, pairs1, threshold=threshold)
            found |= zip(places, together.split(len(features0)), strict=True)
        return [found[k] for k in range(len(others))]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _alike(others: Sequence[Features], at_once: int) -> Iterator[list[int]]:
    """Places of images of one size, at most so many together."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, features in enumerate(others):
        places.setdefault(features.grid, []).append(place)
    for alike in places.values():
        yield from (alike[k : k + at_once] for k in range(0, len(alike), at_once))


def _repeated(features: Features, times: int) -> Features:
    """All images, so many times one after the other."""
    return features if times == 1 else Features(features.tokens.repeat(times, 1, 1), features.grid)


def _each(singles: Sequence[Features], times: int) -> Features:
    """Every image so many times in a row; one alone as it is, since it stands for as many."""
    if len(singles) == 1:
        return singles[0]
    tokens = torch.cat([features.tokens for features in singles])
    return Features(tokens.repeat_interleave(times, 0), singles[0].grid)


def weights_digest(weights: Mapping[str, Tensor], configuration: Any) -> str:
    """SHA-256 over a configuration and named tensors, wherever they lie."""
    found = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _limit(limits: Mapping[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])


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
        dtype: Of convolutions and projections; the sums of attention and softmax stay float32.

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
