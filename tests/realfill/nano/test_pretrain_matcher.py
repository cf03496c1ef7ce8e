"""The matcher learns from pairs whose truth is exact."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import pytest
import torch
from kornia.feature import LoFTR
from safetensors import safe_open

from realfill.nano.pairs import UNKNOWN, UNMATCHED, make_pairs
from realfill.nano.pretrain_matcher import (
    CONFIG,
    REFUSAL,
    export_matcher,
    matching_loss,
    new_matcher,
    train_matcher,
)
from realfill.nano.stereo import check_stereo
from realfill.rank.matching import CoarseLoFTR, LoFTRMatcher, loftr
from tests.realfill.nano.pairs import little_pool

DEVICE = torch.device("cpu")


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
    assert losses[0] < 0.6
    assert losses[1] > 100
    assert losses[2] > 5


def test_every_pair_weighs_alike_in_the_loss() -> None:
    """A pair of different places costs as much beside a small overlap as beside a large one."""
    alien = torch.full((100,), UNMATCHED)
    large = torch.arange(100)
    small = torch.where(large < 50, large, UNKNOWN)
    sure = torch.eye(100)[None] * 40
    for matched in (large, small):
        both = torch.cat([sure, sure])
        loss = float(matching_loss(both, torch.stack([matched, alien])))
        assert loss == pytest.approx(REFUSAL * -math.log(1e-4), rel=0.01)


def test_training_for_a_time_ends_and_lets_the_rate_fall(tmp_path: Path) -> None:
    """With ``seconds`` the number of steps is what fits, whatever ``steps`` says."""
    config = copy.deepcopy(CONFIG)
    config["coarse"]["layer_names"] = ["self", "cross"]
    began = time.monotonic()
    taken = list(
        train_matcher(
            new_matcher(config, seed=1),
            *little_pool(),
            tmp_path / "timed",
            steps=10**9,
            seed=5,
            device=DEVICE,
            batch=1,
            seconds=2.0,
        )
    )
    assert 2.0 <= time.monotonic() - began < 60
    assert taken[-1].step == len(taken)
    assert taken[-1].steps < 10**6


def test_training_lowers_the_loss_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """A run cut in two ends where an uninterrupted run ends."""
    pool, sharp = little_pool()
    config = copy.deepcopy(CONFIG)
    config["coarse"]["layer_names"] = ["self", "cross"]

    pairs = make_pairs(pool, sharp, 4, 80, 0.1, torch.Generator().manual_seed(7))
    both = torch.cat([pairs.images0, pairs.images1])

    @torch.no_grad()
    def cost(net: CoarseLoFTR) -> float:
        net = copy.deepcopy(net).train()
        return float(matching_loss(net.similarity(*net.tokens(both).chunk(2)), pairs.partner))

    def run(name: str, stop: int) -> tuple[list[float], CoarseLoFTR]:
        net = new_matcher(config, seed=1)
        steps = train_matcher(
            net,
            pool,
            sharp,
            tmp_path / name,
            steps=8,
            seed=5,
            device=DEVICE,
            batch=1,
            peak=2e-2,
            keep_every=4,
        )
        return [step.loss for step, _ in zip(steps, range(stop), strict=False)], net

    losses, whole = run("whole", 8)
    run("cut", 5)
    rest, cut = run("cut", 8)
    assert cost(whole) < 0.95 * cost(new_matcher(config, seed=1))
    assert len(rest) == 4
    assert rest[-1] == losses[-1]
    ends = cut.state_dict()
    assert all(torch.equal(tensor, ends[name]) for name, tensor in whole.state_dict().items())


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


@pytest.mark.gpu
@pytest.mark.weights
def test_nano_matches_the_motorcycle_on_a_gpu() -> None:
    """The check takes a matcher wherever it is, and finds what it finds on a CPU, nearly."""
    there, here = check_stereo(loftr("nano", "cuda")), check_stereo(loftr("nano"))
    assert abs(there.matches - here.matches) <= 0.02 * here.matches
    assert abs(there.precision - here.precision) <= 0.02
