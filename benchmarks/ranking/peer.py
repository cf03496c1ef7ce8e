"""The peer: kornia's LoFTR as the public scripts use it, one pair after another."""

from __future__ import annotations

import torch
from kornia.feature import LoFTR
from torch import Tensor

from benchmarks.ranking.pictures import Pictures
from realfill.rank.matching import LoFTRMatcher

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
