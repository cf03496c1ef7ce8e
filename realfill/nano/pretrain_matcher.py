"""Pretrain nano-loftr: a small LoFTR that learns from known warps of the picture pool.

Every pair shows one picture twice: image 0 through a smooth displacement, image 1 through a
homography, each with its own light, blur and noise, behind an occluder that moves by itself. Where
a pixel of image 0 lies in image 1 is then a closed formula.

Source: LoFTR, arXiv:2104.00680.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from realfill.nano.photographs import PHOTOGRAPHS, photograph, view
from realfill.nano.stage import Step, learning_rate
from realfill.rank.matching import CELL_PX, CoarseLoFTR

WORKING_PX = 256
WORLD_PX = 320
UNMATCHED, UNKNOWN = -1, -2

CONFIG: dict[str, Any] = {
    "backbone_type": "ResNetFPN",
    "resolution": [8, 2],
    "fine_window_size": 5,
    "fine_concat_coarse_feat": True,
    "resnetfpn": {"initial_dim": 16, "block_dims": [16, 40, 64]},
    "coarse": {
        "d_model": 64,
        "d_ffn": 64,
        "nhead": 4,
        "layer_names": ["self", "cross"] * 4,
        "attention": "linear",
        "temp_bug_fix": True,
    },
    "match_coarse": {
        "thr": 0.2,
        "border_rm": 0,
        "match_type": "dual_softmax",
        "dsmax_temperature": 0.1,
        "skh_iters": 3,
        "skh_init_bin_score": 1.0,
        "skh_prefilter": True,
        "train_coarse_percent": 0.4,
        "train_pad_num_gt_min": 200,
    },
    # The fine stage is neither trained nor shipped; kornia's constructor wants its sizes.
    "fine": {
        "d_model": 16,
        "d_ffn": 16,
        "nhead": 2,
        "layer_names": ["self"],
        "attention": "linear",
    },
    "working_px": WORKING_PX,
}


@dataclass(frozen=True)
class Pairs:
    """Image pairs with their truth.

    Attributes:
        images0: Grey, in [0, 1]. [N, 1, H, W]
        images1: Grey, in [0, 1]. [N, 1, H, W]
        partner: For each cell of image 0 the cell of image 1 that shows the same point, UNMATCHED
            where none does, UNKNOWN where nothing is known. [N, L]
    """

    images0: Tensor
    images1: Tensor
    partner: Tensor


def worlds(pictures: NDArray[np.uint8], *, seed: int, sharp: int = 480) -> tuple[Tensor, Tensor]:
    """Grey pictures to look at: the pool, and sharper views of the bundled photographs.

    Returns:
        The pool [K, 1, 160, 160] and the sharp views [sharp, 1, 320, 320], uint8.
    """
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    pool = np.stack([(picture @ luma + 0.5).astype(np.uint8) for picture in pictures])
    views = np.empty((sharp, WORLD_PX, WORLD_PX), np.uint8)
    for k in range(sharp):
        rng = np.random.default_rng((seed, 6, k))
        photo = photograph(PHOTOGRAPHS[k % len(PHOTOGRAPHS)])
        views[k] = (view(rng, photo, WORLD_PX, zoom=0.5) @ luma + 0.5).astype(np.uint8)
    return torch.from_numpy(pool)[:, None], torch.from_numpy(views)[:, None]


def _uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _smooth(generator: torch.Generator, channels: int, count: int, knots: int, size: int) -> Tensor:
    """A smooth random field of unit deviation at its knots. [count, channels, size, size]"""
    noise = torch.randn((count, channels, knots, knots), generator=generator)
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)


def _homographies(generator: torch.Generator, count: int, scale: Tensor, reach: float) -> Tensor:
    """From image to world, both in [-1, 1]: turn, zoom, shift, shear and tilt. [count, 3, 3]"""
    angle = _uniform(generator, (count,), -1, 1) * (0.08 + 0.5 * reach)
    zoom = scale * _uniform(generator, (count,), -1, 1).mul(0.08 + 0.5 * reach).exp()
    bend = _uniform(generator, (count, 2, 2), -1, 1) * 0.15 * reach
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    out = torch.eye(3).repeat(count, 1, 1)
    out[:, :2, :2] = zoom[:, None, None] * (turn + bend)
    out[:, :2, 2] = _uniform(generator, (count, 2), -1, 1) * (0.1 + 0.35 * reach) * scale[:, None]
    out[:, 2, :2] = _uniform(generator, (count, 2), -1, 1) * 0.12 * reach
    return out


def _apply(homography: Tensor, points: Tensor) -> Tensor:
    """Points in [-1, 1], column first. [N, h, w, 2]"""
    ones = torch.ones_like(points[..., :1])
    moved = torch.cat([points, ones], -1).flatten(1, 2) @ homography.transpose(1, 2)
    moved = moved[..., :2] / moved[..., 2:].clamp(min=0.1)
    return moved.view_as(points)


def _sample(pictures: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(
        pictures, points, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _light(generator: torch.Generator, pixels: Tensor, reach: float) -> Tensor:
    """Exposure, contrast, shading, defocus and grain, for each image its own. [N, 1, H, W]"""
    count, size = len(pixels), pixels.shape[-1]

    def each(low: float, high: float) -> Tensor:
        return _uniform(generator, (count, 1, 1, 1), low, high)

    # Defocus by a gaussian, in the width of which images differ.
    sigma = each(0.0, 1.0).square() * (1.0 + 2.0 * reach) + 0.05
    taps = torch.arange(-6, 7.0)
    kernel = (-0.5 * (taps / sigma.view(-1, 1)).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).view(count, 1, 1, 13)
    stacked = F.pad(pixels.transpose(0, 1), (6, 6, 6, 6), mode="reflect")
    stacked = F.conv2d(F.conv2d(stacked, kernel, groups=count), kernel.mT, groups=count)
    pixels = stacked.transpose(0, 1).clamp(1e-4, 1) ** each(-0.6 * reach, 0.6 * reach).exp()
    shading = _smooth(generator, 1, count, 3, size) * 0.15 * reach
    middle = pixels.mean((2, 3), keepdim=True)
    pixels = (pixels - middle) * each(1 - 0.5 * reach, 1 + 0.3 * reach) + middle
    pixels = pixels * (1 + shading) + each(-0.15 * reach, 0.15 * reach)
    grain = torch.randn(pixels.shape, generator=generator) * each(0, 0.01 + 0.03 * reach)
    return (pixels + grain).clamp(0, 1)


def make_pairs(
    pool: Tensor, sharp: Tensor, count: int, size_px: int, reach: float, generator: torch.Generator
) -> Pairs:
    """Make pairs with known truth.

    Args:
        pool: From ``worlds``. [K, 1, 160, 160]
        sharp: From ``worlds``. [M, 1, 320, 320]
        count: Number of pairs.
        size_px: Height and width of both images, a multiple of 8.
        reach: From 0, hardly moved, to 1, far apart in view and light.
        generator: Source of every random choice.

    Returns:
        Pairs of which one in ten shows two different places, and one in four another occluder.
    """
    back, front = (_pictures(pool, sharp, count, generator) for _ in range(2))
    scale = _uniform(generator, (count,), math.log(0.5), math.log(1.0)).exp()
    scale = (scale * (size_px / 160) ** 0.5).clamp(max=1.0)
    first = _homographies(generator, count, scale, 0.3 * reach)
    second = _homographies(generator, count, scale, reach)
    amplitude = scale * _uniform(generator, (count,), 0, 0.02 + 0.08 * reach)
    bend = _smooth(generator, 2, count, 4, size_px) * amplitude.view(-1, 1, 1, 1)
    # The occluder has its own texture and moves apart from what is behind it.
    blob = _blobs(generator, count)
    apart = torch.eye(3).repeat(count, 1, 1)
    apart[:, :2, 2] = _uniform(generator, (count, 2), -1, 1) * (0.05 + 0.25 * reach)
    apart[:, :2, 2] *= scale[:, None]
    second_front = apart @ second
    alien = torch.rand((count, 1, 1, 1), generator=generator) < 0.1
    alien_front = alien | (torch.rand((count, 1, 1, 1), generator=generator) < 0.25)

    axis = (torch.arange(size_px) * 2 + 1) / size_px - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).expand(count, -1, -1, -1)
    world0 = _apply(first, grid) + bend.permute(0, 2, 3, 1)
    world1, world1_front = _apply(second, grid), _apply(second_front, grid)
    near0, near1 = _sample(blob, world0) > 0, _sample(blob, world1_front) > 0
    images0 = torch.where(near0, _sample(front, world0), _sample(back, world0))
    behind = _sample(torch.where(alien, back.roll(1, 0), back), world1)
    before = _sample(torch.where(alien_front, front.roll(1, 0), front), world1_front)
    images1 = torch.where(near1, before, behind)

    cells, near = world0[:, ::CELL_PX, ::CELL_PX], near0[:, 0, ::CELL_PX, ::CELL_PX]
    moved = torch.where(
        near[..., None],
        _apply(torch.linalg.inv(second_front), cells),
        _apply(torch.linalg.inv(second), cells),
    )
    near_there = _sample(blob, _apply(second_front, moved))[:, 0] > 0
    strange = torch.where(near, alien_front[:, 0], alien[:, 0])
    partner = _partner(moved, (near_there == near) & ~strange, size_px)
    # Beyond its edge a picture is mirrored, so that a point may be seen twice.
    partner[(cells.abs().amax(-1) >= 1).flatten(1)] = UNKNOWN
    return Pairs(_light(generator, images0, reach), _light(generator, images1, reach), partner)


def _blobs(generator: torch.Generator, count: int) -> Tensor:
    """Fields that are positive on a smooth shape, half of them nowhere. [count, 1, 320, 320]"""
    field = _smooth(generator, 1, count, 6, 64)
    area = (torch.rand((count,), generator=generator) - 0.5).clamp(min=0)
    ranked = field.flatten(1).sort(descending=True).values
    level = ranked.gather(1, (area * ranked.shape[1]).long()[:, None])
    level = torch.where(area[:, None] > 0, level, torch.inf)
    field = (field - level.view(-1, 1, 1, 1)).clamp(min=-1)
    return F.interpolate(field, size=(WORLD_PX, WORLD_PX), mode="bilinear")


def _pictures(pool: Tensor, sharp: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random worlds in [0, 1], flipped and turned at random. [count, 1, 320, 320]"""
    few = count // 4
    soft = pool[torch.randint(len(pool), (count - few,), generator=generator)]
    soft = F.interpolate(soft.float(), scale_factor=2.0, mode="bilinear")
    keen = sharp[torch.randint(len(sharp), (few,), generator=generator)].float()
    pictures = torch.cat([soft, keen])[torch.randperm(count, generator=generator)] / 255
    turns = torch.randint(8, (count,), generator=generator).tolist()
    turned = [
        p.rot90(k % 4, (1, 2)).flip(2) if k > 3 else p.rot90(k, (1, 2))
        for p, k in zip(pictures, turns, strict=True)
    ]
    return torch.stack(turned)


def _partner(moved: Tensor, visible: Tensor, size_px: int) -> Tensor:
    """Nearest cell of each moved cell, which several do not share: the nearest has it. [N, L]"""
    side = size_px // CELL_PX
    place = (((moved + 1) * size_px - 1) / 2 / CELL_PX).flatten(1, 2)
    nearest = place.round()
    inside = ((nearest >= 0) & (nearest < side)).all(-1) & visible.flatten(1)
    cell = (nearest[..., 1] * side + nearest[..., 0]).long().clamp(0, side * side - 1)
    distance = torch.where(inside, (place - nearest).square().sum(-1), torch.inf)
    least = torch.full_like(distance, torch.inf).scatter_reduce(1, cell, distance, "amin")
    partner = torch.where(distance == least.gather(1, cell), cell, UNKNOWN)
    return torch.where(inside, partner, UNMATCHED)


def matching_loss(logits: Tensor, partner: Tensor) -> Tensor:
    """Negative log likelihood of true matches, and of no match where there is none.

    Args:
        logits: From ``CoarseLoFTR.similarity``. [N, L, S]
        partner: From ``make_pairs``. [N, L]
    """
    log_rows, log_columns = logits.logsumexp(2), logits.logsumexp(1)
    matched = partner >= 0
    cell = partner.clamp(min=0)
    own = logits.gather(2, cell[..., None])[..., 0]
    log_true = 2 * own - log_rows - log_columns.gather(1, cell)
    loss = -(log_true * matched).sum() / matched.sum().clamp(min=1)
    with torch.no_grad():
        rival = torch.sub(logits, log_columns[:, None], alpha=0.5).argmax(2)
    rivals = logits.gather(2, rival[..., None])[..., 0]
    best = 2 * rivals - log_rows - log_columns.gather(1, rival)
    alone = partner == UNMATCHED
    refused = -torch.log1p(-best.exp().clamp(max=1 - 1e-4))
    return loss + (refused * alone).sum() / alone.sum().clamp(min=1)


def new_matcher(config: dict[str, Any] = CONFIG, *, seed: int = 0) -> CoarseLoFTR:
    """A matcher of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoarseLoFTR(config)


def train_matcher(
    net: CoarseLoFTR,
    pool: Tensor,
    sharp: Tensor,
    checkpoint: Path,
    *,
    steps: int,
    seed: int,
    device: torch.device,
    batch: int = 8,
    peak: float = 1.5e-3,
    keep_every: int = 100,
) -> Iterator[Step]:
    """Fit the matcher to pairs with known truth, from near to far; resumes from ``checkpoint``."""
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=1e-2)
    net.to(device).train()
    for parameter in parameters:
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    begin, running = 0, 0.0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        begin, running = kept["step"], kept["loss"]
    for step in range(begin, steps):
        draw = int(np.random.default_rng((seed, 7, step)).integers(2**62))
        generator = torch.Generator().manual_seed(draw)
        done = step / steps
        # The last part is seen at the size at which it will work.
        size_px, count = (160, batch) if done < 0.7 else (WORKING_PX, max(1, batch // 2))
        pairs = make_pairs(pool, sharp, count, size_px, min(1.0, 0.1 + 2.5 * done), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warm_up=100)
        both = torch.cat([pairs.images0, pairs.images1]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            tokens0, tokens1 = net.tokens(both.to(memory_format=torch.channels_last)).chunk(2)
            logits = net.similarity(tokens0, tokens1)
        loss = matching_loss(logits.float(), pairs.partner.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if (step + 1) % keep_every == 0 or step + 1 == steps:
            _keep(
                checkpoint,
                module=net.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                loss=running,
            )
        yield Step("matcher", step + 1, steps, running)


def _keep(checkpoint: Path, **state: object) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    draft = checkpoint.with_suffix(".part")
    torch.save(state, draft)
    draft.replace(checkpoint)


def export_matcher(net: CoarseLoFTR, path: Path) -> None:
    """Write the weights as fp16 safetensors, with the configuration in the metadata."""
    weights = {
        name: tensor.detach().cpu().half() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in net.state_dict().items()
    }
    config = {**net.config, "resolution": list(net.config["resolution"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor.contiguous() for name, tensor in weights.items()}
    path.write_bytes(save(packed, {"config": json.dumps(config, sort_keys=True)}))
