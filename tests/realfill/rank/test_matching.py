"""The coarse matcher finds exactly what plain kornia finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kornia.feature.loftr.loftr import default_cfg, urls
from safetensors.torch import save_file
from scipy.stats import spearmanr

from realfill.errors import MatcherUnavailable
from realfill.nano.pretrain_matcher import CONFIG
from realfill.rank import matching
from realfill.rank.correspondences import Features, Matches
from realfill.rank.matching import loftr
from realfill.rank.ranking import rank_candidates
from realfill.rank.references import prepare_references
from tests.realfill.rank.pictures import (
    coarse,
    grey_photo,
    plain_loftr,
    shifted_pairs,
    with_threshold,
)


# Random weights are rarely sure, so thresholds are low enough for matches to exist.
@pytest.mark.parametrize(("base", "threshold"), [(default_cfg, 1e-3), (CONFIG, 2e-2)])
@torch.no_grad()
def test_matches_equal_plain_kornia(base: dict[str, Any], threshold: float) -> None:
    """Points, pairs and counts equal ``LoFTR.forward`` pair by pair, in both configurations."""
    plain = plain_loftr(with_threshold(base, threshold))
    matcher = coarse(plain)
    images0, images1 = shifted_pairs(64, 96)
    found = matcher.match(matcher.features(images0), matcher.features(images1))
    for pair in range(3):
        truth = plain({"image0": images0[pair, None], "image1": images1[pair, None]})
        mine = found.of_pair(pair)
        assert len(mine) == len(truth["confidence"]) > 0
        assert torch.equal(mine.points0, truth["keypoints0"])
        assert (mine.points1 - truth["keypoints1"]).abs().max() <= 4
        torch.testing.assert_close(mine.confidence, truth["confidence"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_matches_equal_plain_kornia_for_images_of_two_sizes() -> None:
    """The two sides of a pair need not have one size."""
    plain = plain_loftr(with_threshold(CONFIG, 2e-2))
    matcher = coarse(plain)
    images0, _ = shifted_pairs(64, 96)
    images1 = images0[..., 8:56, 16:]
    found = matcher.match(matcher.features(images0), matcher.features(images1))
    truth = plain({"image0": images0, "image1": images1})
    assert len(truth["confidence"]) > 0
    assert torch.equal(found.pair, truth["batch_indexes"])
    assert torch.equal(found.points0, truth["keypoints0"])


def test_chunks_do_not_change_the_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs matched one by one give what they give together."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    images0, images1 = shifted_pairs(64, 64)
    features = matcher.features(images0), matcher.features(images1)
    together = matcher.match(*features)
    monkeypatch.setattr(matching, "CHUNK_CELLS", {"cpu": 1})
    monkeypatch.setattr(matching, "CHUNK_PX", {"cpu": 1})
    features = matcher.features(images0), matcher.features(images1)
    alone = matcher.match(*features)
    assert len(together) > 0
    assert torch.equal(together.pair, alone.pair)
    assert torch.equal(together.points1, alone.points1)


@pytest.mark.parametrize(("room", "calls"), [(2**20, 2), (6 * 64, 3), (64, 4)])
def test_images_of_one_size_meet_at_once(
    room: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a chunk takes, three of one size and one of another; matches are the same."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    images0, images1 = shifted_pairs(64, 64)
    features = matcher.features(images0)
    others = [matcher.features(image[None]) for image in (*images1, images1[0, :, 8:])]
    alone = [matcher.compare(features, other) for other in others]
    monkeypatch.setattr(matching, "CHUNK_CELLS", {"cpu": room})
    compare, seen = matcher.compare, []

    def counted(*pairs: Features, threshold: float | None) -> Matches:
        seen.append([len(side) for side in pairs])
        return compare(*pairs, threshold=threshold)

    monkeypatch.setattr(matcher, "compare", counted)
    together = matcher.compare_each(features, others)
    assert len(seen) == calls
    for found, expected in zip(together, alone, strict=True):
        kept = expected.confidence > 0
        assert kept.any()
        assert torch.equal(found.confidence > 0, kept)
        assert torch.equal(found.points1[kept], expected.points1[kept])


def test_one_reference_is_matched_with_every_candidate() -> None:
    """A single image 1 stands for as many as there are images 0."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    images0, images1 = shifted_pairs(64, 64)
    one = matcher.match(matcher.features(images0), matcher.features(images1[:1]))
    many = matcher.match(matcher.features(images0), matcher.features(images1[[0, 0, 0]]))
    assert torch.equal(one.pair, many.pair)
    assert torch.equal(one.points1, many.points1)


def test_uneven_batches_are_refused() -> None:
    """Two images cannot be paired with three."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 0.2)))
    images0, images1 = shifted_pairs(64, 64)
    with pytest.raises(ValueError, match="2 images cannot be paired with 3"):
        matcher.match(matcher.features(images0[:2]), matcher.features(images1))


def test_sides_beyond_the_multiple_are_refused() -> None:
    """A side of 60 px is no number of cells."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 0.2)))
    with pytest.raises(ValueError, match="multiples of 8"):
        matcher.features(torch.zeros(1, 1, 60, 64))


def test_matches_at_the_border_count() -> None:
    """An image matched with itself matches in its corner cells too."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 0.0)))
    images0, _ = shifted_pairs(64, 64)
    features = matcher.features(images0[:1])
    points = matcher.match(features, features).points0
    assert points.min() == 0
    assert points.max() == 56


def test_a_file_with_its_configuration_loads(tmp_path: Path) -> None:
    """Weights and configuration of a safetensors file give the matcher that wrote them."""
    plain = plain_loftr(with_threshold(CONFIG, 2e-2))
    path = tmp_path / "small.safetensors"
    save_file(dict(plain.state_dict()), path, {"config": json.dumps(plain.config)})
    images0, images1 = shifted_pairs(64, 64)
    counts = []
    for matcher in (coarse(plain), loftr(path)):
        found = matcher.match(matcher.features(images0), matcher.features(images1))
        counts.append(torch.bincount(found.pair, minlength=3).tolist())
    assert counts[0] == counts[1]
    assert sum(counts[0]) > 0


def test_a_checkpoint_of_the_full_model_loads(tmp_path: Path) -> None:
    """The published ``.ckpt`` form loads with the full configuration."""
    plain = plain_loftr(with_threshold(default_cfg, 0.2))
    path = tmp_path / "outdoor.ckpt"
    weights = {f"matcher.{name}": tensor for name, tensor in plain.state_dict().items()}
    torch.save({"state_dict": weights}, path)
    matcher = loftr(path)
    assert matcher.working_px == 512
    key = "loftr_coarse.layers.7.norm2.weight"
    assert torch.equal(matcher.net.state_dict()[key], plain.state_dict()[key])


def test_missing_weights_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    """A path that does not exist is answered with a way out."""
    with pytest.raises(MatcherUnavailable, match=r"absent\.safetensors do not exist; pass"):
        loftr(tmp_path / "absent.safetensors")


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    """Bytes that are no safetensors file are refused."""
    path = tmp_path / "torn.safetensors"
    path.write_bytes(b"torn")
    with pytest.raises(MatcherUnavailable, match="cannot be read"):
        loftr(path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Weights that lack the matcher's tensors are refused, and a missing one is named."""
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(MatcherUnavailable, match=r"missing.*backbone"):
        loftr(path)


def test_an_unreachable_hub_is_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Published weights that cannot be downloaded are answered with a way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(urls, "outdoor", [(tmp_path / "loftr_outdoor.ckpt").as_uri()])
    with pytest.raises(MatcherUnavailable, match="could not be downloaded"):
        loftr("outdoor")


@pytest.mark.weights
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_reduced_precision_keeps_the_order_of_counts(dtype: torch.dtype) -> None:
    """Counts of sixteen candidates, from sharp to shapeless, correlate by rank to 0.99."""
    truth, reference = grey_photo("motorcycle_right.png"), grey_photo("motorcycle_left.png")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(truth.shape, generator=generator)
    candidates = torch.cat([(truth + 0.025 * k * noise).clamp(0, 1) for k in range(16)])
    counts = []
    for matcher in (loftr("nano"), loftr("nano", dtype=dtype)):
        features = matcher.features(candidates)
        assert features.tokens.dtype == torch.float32
        counts.append(
            (matcher.compare(features, matcher.features(reference)).confidence > 0).sum(1)
        )
    assert len(counts[0].unique()) > 10
    assert spearmanr(*counts).statistic >= 0.99


@torch.no_grad()
def test_half_precision_holds_large_images() -> None:
    """Attention over 4096 cells of the full configuration stays finite in float16."""
    matcher = coarse(plain_loftr(with_threshold(default_cfg, 0.0)), torch.float16)
    tokens = torch.randn((1, 4096, 256), generator=torch.Generator().manual_seed(0)) * 3
    layer = matcher.net.loftr_coarse.layers[0]
    with torch.autocast("cpu", torch.float16):
        assert layer(tokens, tokens).isfinite().all()


def test_the_digest_is_of_weights_and_configuration() -> None:
    """Equal matchers share it; another threshold or weight has another."""
    plain = plain_loftr(with_threshold(CONFIG, 2e-2))
    digest = coarse(plain).digest
    assert len(digest) == 64
    assert coarse(plain).digest == digest
    assert coarse(plain, torch.bfloat16).digest == digest
    assert coarse(plain_loftr(with_threshold(CONFIG, 3e-2))).digest != digest
    with torch.no_grad():
        plain.loftr_coarse.layers[0].q_proj.weight[0, 0] += 1
    assert coarse(plain).digest != digest


# torch says of the mode that it may miss some.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.gpu
def test_ranking_does_not_wait_for_the_device() -> None:
    """Between images in and scores out the host never synchronises."""
    matcher = loftr("nano", "cuda")
    candidates = torch.rand(4, 3, 256, 256, device="cuda")
    mask = torch.ones(256, 256)
    references = prepare_references(matcher, list(candidates[:2]))
    rank_candidates(matcher, candidates, mask, references)
    try:
        torch.cuda.set_sync_debug_mode("error")
        rank_candidates(matcher, candidates, mask, references)
    finally:
        torch.cuda.set_sync_debug_mode("default")
