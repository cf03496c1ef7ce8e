"""Pretrain nano-loftr: a small LoFTR that learns from pairs whose truth is known.

Source: LoFTR, arXiv:2104.00680.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from realfill.nano.pairs import UNMATCHED, make_pairs
from realfill.nano.stage import RunningLoss, Step, drawn_from, half_precision, learning_rate
from realfill.rank.matching import CoarseLoFTR

WORKING_PX = 256
# What a wrong match costs, where a missed one costs 1.
REFUSAL = 2.0

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


def matching_loss(logits: Tensor, partner: Tensor) -> Tensor:
    """Negative log likelihood of true matches, and of no match where there is none.

    Every pair weighs alike: a small overlap as much as a large one, and a pair of different places
    as much as the unmatched cells of any other.

    Args:
        logits: From ``CoarseLoFTR.similarity``. [N, L, S]
        partner: From ``make_pairs``. [N, L]
    """
    log_rows, log_columns = logits.logsumexp(2), logits.logsumexp(1)
    cell = partner.clamp(min=0)
    own = logits.gather(2, cell[..., None])[..., 0]
    log_true = 2 * own - log_rows - log_columns.gather(1, cell)
    with torch.no_grad():
        rival = torch.sub(logits, log_columns[:, None], alpha=0.5).argmax(2)
    rivals = logits.gather(2, rival[..., None])[..., 0]
    best = 2 * rivals - log_rows - log_columns.gather(1, rival)
    refused = -torch.log1p(-best.exp().clamp(max=1 - 1e-4))
    missed = _mean_of_pairs(-log_true, partner >= 0)
    return missed + REFUSAL * _mean_of_pairs(refused, partner == UNMATCHED)


def _mean_of_pairs(costs: Tensor, counted: Tensor) -> Tensor:
    """Mean over the pairs that have any, of their means; of few cells they weigh less. [N, L]"""
    cells = counted.sum(1)
    few = costs.shape[1] / 50
    means = (costs * counted).sum(1) / cells.clamp(min=few)
    return means.sum() / (cells > 0).sum().clamp(min=1)


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
    batch: int = 4,
    peak: float = 2e-3,
    keep_every: int = 100,
    seconds: float | None = None,
) -> Iterator[Step]:
    """Fit the matcher to pairs with known truth, from near to far; resumes from ``checkpoint``.

    Args:
        net: Trained in place.
        pool: From ``worlds``.
        sharp: From ``worlds``.
        checkpoint: Kept every ``keep_every`` steps.
        steps: Number of steps.
        seed: Of every pair.
        device: Where pairs are made and learned from.
        batch: Pairs of 256 px in a step; as many pixels while they are smaller.
        peak: Largest learning rate.
        keep_every: Steps between checkpoints.
        seconds: Stop after this time instead, with schedules stretched to it. Weights then depend
            on the machine.
    """
    parameters = list(net.parameters())
    net.to(device).train()
    for parameter in parameters:
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=(0.9, 0.98), weight_decay=1e-2, fused=cuda
    )
    step, running = 0, RunningLoss("matcher", 0.98)
    if checkpoint.exists():
        kept = torch.load(checkpoint, map_location=device, weights_only=True)
        net.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        step = kept["step"]
        running = RunningLoss("matcher", 0.98, step=step, mean=kept["loss"])
    pool, sharp = pool.to(device), sharp.to(device)
    began = time.monotonic()
    while True:
        done = step / steps if seconds is None else (time.monotonic() - began) / seconds
        if done >= 1:
            break
        if seconds is not None:
            steps = max(step + 1, round(step / max(done, 1e-9)))
        # The last part is seen at the size at which it will work.
        size_px = 160 if done < 0.4 else WORKING_PX
        count = batch * WORKING_PX**2 // size_px**2
        generator = drawn_from(seed, 7, step, device=device)
        pairs = make_pairs(pool, sharp, count, size_px, min(1.0, 0.1 + 2.5 * done), generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warm_up=100)
        both = torch.cat([pairs.images0, pairs.images1])
        with half_precision(device):
            tokens = net.tokens(both.to(memory_format=torch.channels_last))
            logits = net.similarity(*tokens.chunk(2))
        loss = matching_loss(logits, pairs.partner)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        running.take(loss)
        step += 1
        if step % keep_every == 0 or (step == steps and seconds is None):
            _keep(
                checkpoint,
                module=net.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                loss=running.read(),
            )
        yield Step("matcher", step, steps, running.value)


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
