"""The peer: kornia's LoFTR as the public scripts use it, one pair after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kornia.feature import LoFTR
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ranking.pictures import Pictures
from realfill.rank.matching import LoFTRMatcher
from realfill.rank.references import at_working_size

PEER = "kornia LoFTR.forward, same weights, candidate by candidate and reference by reference"


def naive_kornia(matcher: LoFTRMatcher) -> LoFTR:
    """Kornia's whole model with the matcher's configuration and weights.

    The fine stage, which neither adds nor drops a match, has random weights where the matcher has
    none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LoFTR(None, matcher.net.config)
    model.load_state_dict(matcher.net.state_dict(), strict=False)
    return model.eval().requires_grad_(False).to(matcher.device)


@torch.no_grad()
def counts(model: LoFTR, seen: Pictures) -> Tensor:
    """Matches that begin in the hole, for each candidate and reference. [N, R]"""
    hole = seen.mask.to(seen.candidates.device) > 0
    table = []
    for candidate in seen.candidates:
        row = []
        for reference in seen.references:
            found = model({"image0": candidate[None], "image1": reference[None]})
            x, y = found["keypoints0"].long().unbind(1)
            row.append(int(hole[y, x].sum()))
        table.append(row)
    return torch.tensor(table)


def counts_at_working_size(
    model: LoFTR,
    matcher: LoFTRMatcher,
    drawn: Tensor,
    references: Sequence[Tensor],
    mask: Tensor,
) -> Tensor:
    """Matches that begin in the hole, for each candidate as it was drawn. [N, R]

    Args:
        model: From ``naive_kornia``.
        matcher: Whose working size counts.
        drawn: Candidates in [0, 1]. [N, 3, H, W]
        references: At working size already. [1, h, w] each
        mask: 1 where pixels were missing. [H, W]
    """
    seen = at_working_size(matcher, drawn.float())
    hole = F.interpolate(mask[None, None], seen.shape[-2:])[0, 0]
    return counts(model, Pictures(seen, tuple(references), hole.to(matcher.device)))
