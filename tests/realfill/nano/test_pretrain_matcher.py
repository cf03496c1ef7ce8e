"""The matcher learns from pairs whose truth is exact."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.feature import LoFTR
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from realfill.nano.pretrain_matcher import (
    CONFIG,
    UNKNOWN,
    UNMATCHED,
    export_matcher,
    make_pairs,
    matching_loss,
    new_matcher,
    train_matcher,
    worlds,
)
from realfill.nano.stereo import check_stereo
from realfill.rank.matching import LoFTRMatcher, loftr

DEVICE = torch.device("cpu")


def _pool(count: int = 8) -> tuple[Tensor, Tensor]:
    """Smooth pictures, as cells are 8 px apart. [count, 1, 160, 160] and [4, 1, 320, 320]"""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count + 4, 1, 10, 10), generator=generator) * 255
    soft = F.interpolate(coarse[:count], size=(160, 160), mode="bicubic").clamp(0, 255)
    sharp = F.interpolate(coarse[count:], size=(320, 320), mode="bicubic").clamp(0, 255)
    return soft.to(torch.uint8), sharp.to(torch.uint8)


def _patches(images: Tensor, size_px: int = 160) -> Tensor:
    """The 3x3 px around each cell's pixel, beyond the edge mirrored. [N, L, 9]"""
    columns = F.unfold(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=8)
    assert columns.shape[2] == (size_px // 8) ** 2
    return columns.transpose(1, 2)


def test_partners_show_the_same_point() -> None:
    """Hardly moved and lit alike, matched cells look alike and other cells do not."""
    pairs = make_pairs(*_pool(), 16, 160, 0.0, torch.Generator().manual_seed(1))
    matched = pairs.partner >= 0
    assert 0.3 < matched.float().mean() < 0.95
    centres0, centres1 = (_patches(i).mean(2) for i in (pairs.images0, pairs.images1))
    partner = pairs.partner.clamp(min=0)
    true = (centres0 - centres1.gather(1, partner))[matched].abs().median()
    shifted = (centres0 - centres1.gather(1, (partner + 7) % 400))[matched].abs().median()
    assert true < 0.5 * shifted


def test_no_two_cells_share_a_partner() -> None:
    """Truth is one to one, as the matcher's mutual nearest cells are."""
    pairs = make_pairs(*_pool(), 16, 160, 1.0, torch.Generator().manual_seed(2))
    for row in pairs.partner:
        partners = row[row >= 0]
        assert len(partners.unique()) == len(partners)
        assert (row >= UNKNOWN).all()
        assert (row < 400).all()


def test_some_pairs_show_different_places() -> None:
    """The matcher also sees pairs in which no cell has a partner."""
    pairs = make_pairs(*_pool(), 48, 80, 0.5, torch.Generator().manual_seed(3))
    empty = (pairs.partner < 0).all(1)
    assert 1 <= int(empty.sum()) <= 16
    assert (pairs.partner == UNMATCHED).any()


def test_pairs_depend_on_the_generator_alone() -> None:
    """Equal seeds give equal pairs, in [0, 1]."""
    one, two = (make_pairs(*_pool(), 4, 80, 0.7, torch.Generator().manual_seed(4)) for _ in "ab")
    assert torch.equal(one.images1, two.images1)
    assert torch.equal(one.partner, two.partner)
    assert one.images0.min() >= 0
    assert one.images0.max() <= 1


def test_the_loss_is_least_at_the_truth() -> None:
    """Sure and right costs nothing, sure and wrong much, sure where nothing matches much."""
    partner = torch.tensor([[0, 1, UNMATCHED, UNKNOWN]])
    right = torch.full((1, 4, 4), -30.0)
    right[0, 0, 0] = right[0, 1, 1] = 30.0
    # The third cell spreads its likeness over two equal ones, so no match is sure.
    right[0, 2:, 2:] = 0.0
    wrong = right[:, [1, 0, 2, 3]]
    bold = right.clone()
    bold[0, 2, 2] = 60.0
    losses = [float(matching_loss(logits, partner)) for logits in (right, wrong, bold)]
    assert losses[0] < 0.5
    assert losses[1] > 100
    assert losses[2] > 5


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """A run cut in two ends where an uninterrupted run ends."""
    pool, sharp = _pool()
    config = copy.deepcopy(CONFIG)
    config["coarse"]["layer_names"] = ["self", "cross"]

    def run(name: str, stop: int) -> tuple[list[float], dict[str, Tensor]]:
        net = new_matcher(config, seed=1)
        steps = train_matcher(
            net, pool, sharp, tmp_path / name, steps=8, seed=5, device=DEVICE, batch=2, keep_every=4
        )
        losses = [step.loss for step, _ in zip(steps, range(stop), strict=False)]
        return losses, {k: v.clone() for k, v in net.state_dict().items()}

    losses, whole = run("whole", 8)
    run("cut", 5)
    rest, cut = run("cut", 8)
    assert losses[-1] < losses[0]
    assert len(rest) == 4
    assert rest[-1] == losses[-1]
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_exported_matcher_loads_here_and_in_plain_kornia(tmp_path: Path) -> None:
    """The file holds only the coarse path, in half precision, with its configuration."""
    net = new_matcher(seed=2)
    path = tmp_path / "weights" / "loftr.safetensors"
    export_matcher(net, path)
    assert path.stat().st_size <= 1_200_000
    assert loftr(path).working_px == 256
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        names = set(file.keys())
    config["resolution"] = tuple(config["resolution"])
    plain = LoFTR(None, config)
    weights = {name: tensor.half().float() for name, tensor in net.state_dict().items()}
    report = plain.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    assert names == set(weights)
    fine = ("fine_", "loftr_fine", "backbone.layer2_outconv", "backbone.layer1_outconv")
    assert all(name.startswith(fine) for name in report.missing_keys)


def test_an_exported_file_has_the_same_bytes_again(tmp_path: Path) -> None:
    """Equal weights give equal files."""
    for name in ("a", "b"):
        export_matcher(new_matcher(seed=2), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_worlds_are_grey_and_leave_the_held_out_photos_alone() -> None:
    """Pool and sharp views become grey bytes; the held-out motorcycle is not among the photos."""
    pictures = np.full((2, 160, 160, 3), (255, 0, 0), np.uint8)
    pool, sharp = worlds(pictures, seed=0, sharp=3)
    assert pool.shape == (2, 1, 160, 160)
    assert pool.unique().tolist() == [76]
    assert sharp.shape == (3, 1, 320, 320)
    assert sharp.float().std() > 10


def test_the_stereo_check_scores_a_matcher_of_random_weights() -> None:
    """The check runs on any matcher, and its share is a share."""
    net = new_matcher(seed=0)
    net.threshold = 0.0
    check = check_stereo(LoFTRMatcher(net, name="random", working_px=128, device=DEVICE))
    assert check.matches > 0
    assert 0 <= check.precision <= 1


@pytest.mark.weights
@pytest.mark.parametrize("through_px", [None, 128])
def test_nano_matches_the_motorcycle_truly(through_px: int | None) -> None:
    """On photos never trained on, sharp or reduced as candidates are, most matches are true."""
    check = check_stereo(loftr("nano"), through_px=through_px)
    assert check.matches >= 60
    assert check.precision >= 0.7
