"""Every matcher keeps one contract, and is had by name or refused with a way out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EfficientLoFTRConfig, EfficientLoFTRForKeypointMatching

from realfill.errors import MatcherUnavailable
from realfill.nano.pretrain_matcher import CONFIG
from realfill.rank import matchers
from realfill.rank.correspondences import Matcher
from realfill.rank.efficientloftr import EfficientLoFTRMatcher
from realfill.rank.matchers import load_matcher
from realfill.rank.matching import LoFTRMatcher
from realfill.rank.matching_onnx import OnnxLoFTRMatcher
from realfill.rank.ranking import rank_candidates
from realfill.rank.references import from_extras, prepare_references, to_extras
from realfill.rank.sift import SiftMatcher
from tests.realfill.rank.pictures import coarse, grey_photo, plain_loftr, with_threshold

CPU = torch.device("cpu")
SIZE_PX = 128


def small_efficientloftr() -> EfficientLoFTRForKeypointMatching:
    """Random weights of a size at which cells differ, and a threshold that some matches reach."""
    torch.manual_seed(0)
    config = EfficientLoFTRConfig(
        stage_num_blocks=[1, 1, 1, 1],
        out_features=[16, 16, 16, 32],
        hidden_size=32,
        num_attention_heads=8,
        num_attention_layers=2,
        coarse_matching_threshold=1e-3,
    )
    model = EfficientLoFTRForKeypointMatching(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    return model


@cache
def matcher_of(name: str) -> Matcher:
    """One small matcher of each kind, made once."""
    if name == "sift":
        return SiftMatcher(most=200)
    if name == "efficientloftr":
        return EfficientLoFTRMatcher(small_efficientloftr(), device=CPU, working_px=SIZE_PX)
    torch_matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    torch_matcher.working_px = SIZE_PX
    return torch_matcher if name == "torch" else OnnxLoFTRMatcher(torch_matcher)


@pytest.fixture(params=["torch", "onnx", "efficientloftr", "sift"])
def matcher(request: pytest.FixtureRequest) -> Matcher:
    return matcher_of(request.param)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Two views of a place and another place. [3, 1, 96, 128]"""
    names = ("motorcycle_left.png", "motorcycle_right.png", "coffee.png")
    return torch.cat([grey_photo(name, 96, SIZE_PX) for name in names])


def test_an_image_matches_itself_where_it_is(matcher: Matcher, photos: Tensor) -> None:
    """Most points of an image find themselves in it, and confidence is in (0, 1]."""
    features = matcher.features(photos[:1])
    found = matcher.match(features, features)
    assert len(found) >= 10
    near = (found.points0 - found.points1).norm(dim=1) <= 8
    assert near.float().mean() > 0.9
    assert found.confidence.min() > 0
    assert found.confidence.max() <= 1 + 1e-5


def test_points_lie_in_their_images(matcher: Matcher, photos: Tensor) -> None:
    """Of two sizes, each point lies in its own image; pairs are in order."""
    narrow = photos[..., :64].contiguous()
    found = matcher.match(matcher.features(photos), matcher.features(narrow))
    for points, width in ((found.points0, SIZE_PX), (found.points1, 64)):
        assert (points >= 0).all()
        assert (points[:, 0] < width).all()
        assert (points[:, 1] < 96).all()
    assert torch.equal(found.pair, found.pair.sort().values)


def test_one_image_stands_for_many(matcher: Matcher, photos: Tensor) -> None:
    """A single image 1 is matched with every image 0, as copies of it would be."""
    features, one = matcher.features(photos), matcher.features(photos[:1])
    copies = matcher.features(photos[[0, 0, 0]])
    single, many = matcher.compare(features, one), matcher.compare(features, copies)
    torch.testing.assert_close(single.confidence, many.confidence, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="3 images cannot be paired with 2"):
        matcher.compare(features, matcher.features(photos[:2]))


def test_several_images_are_matched_as_each_of_them(matcher: Matcher, photos: Tensor) -> None:
    """Of two sizes in turns; what is found keeps their order."""
    features, narrow = matcher.features(photos), photos[..., :64].contiguous()
    others = [matcher.features(photo[None]) for k in range(3) for photo in (photos[k], narrow[k])]
    together = matcher.compare_each(features, others, threshold=0.0)
    assert len(together) == 6
    for found, other in zip(together, others, strict=True):
        alone = matcher.compare(features, other, threshold=0.0)
        assert torch.equal(found.points0, alone.points0)
        assert torch.equal(found.confidence > 0, alone.confidence > 0)
        kept = alone.confidence > 0
        assert torch.equal(found.points1[kept], alone.points1[kept])
        torch.testing.assert_close(found.confidence, alone.confidence, rtol=1e-4, atol=1e-6)


def test_a_lower_threshold_adds_matches_and_changes_none(matcher: Matcher, photos: Tensor) -> None:
    """Of all pairs that are each other's best, those above the matcher's own are its matches."""
    pair = matcher.features(photos), matcher.features(photos[1:2])
    every, sure = matcher.compare(*pair, threshold=0.0), matcher.compare(*pair)
    assert torch.equal(every.above(matcher.threshold).confidence, sure.confidence)
    kept = sure.confidence > 0
    assert torch.equal(every.points1[kept], sure.points1[kept])
    assert (every.confidence > 0).sum() > kept.sum() > 0


def test_neighbours_do_not_change_a_pair(matcher: Matcher, photos: Tensor) -> None:
    """An image's matches are the same alone and in a batch."""
    reference = matcher.features(photos[1:2])
    together = matcher.compare(matcher.features(photos), reference)
    for k in range(3):
        alone = matcher.compare(matcher.features(photos[k, None]), reference)
        assert torch.equal(alone.confidence[0] > 0, together.confidence[k] > 0)


def test_blank_images_give_numbers(matcher: Matcher, photos: Tensor) -> None:
    """An image without any structure is matched with finite numbers, from either side."""
    blank, real = (matcher.features(x) for x in (torch.zeros(1, 1, 96, 128), photos[:1]))
    for pair in ((blank, real), (real, blank), (blank, blank)):
        confidence = matcher.compare(*pair).confidence
        assert confidence.isfinite().all()
        assert (confidence >= 0).all()


def test_sides_beyond_the_multiple_are_refused(matcher: Matcher) -> None:
    """A side that cannot be divided is named."""
    with pytest.raises(ValueError, match=f"multiples of {matcher.size_multiple}"):
        matcher.features(torch.zeros(1, 1, 96, 100))


def test_references_kept_in_a_capsule_rank_alike(matcher: Matcher, photos: Tensor) -> None:
    """What is kept by name gives the scores of the photos; another matcher's is not taken."""
    candidates, mask = photos.expand(-1, 3, -1, -1), torch.ones(96, 128)
    prepared = prepare_references(matcher, [photos[0], photos[1, :, :, :64]])
    extras = to_extras(matcher, prepared)
    kept = from_extras(matcher, extras)
    assert kept is not None
    assert kept.sizes == ((96, 128), (96, 64))
    fresh, again = (rank_candidates(matcher, candidates, mask, r) for r in (prepared, kept))
    assert torch.equal(fresh.per_reference, again.per_reference)
    assert fresh.best == 0
    other = matcher_of("sift" if matcher.name != "sift" else "torch")
    assert from_extras(other, extras) is None
    torn = {k: v[:-1] if k.endswith("frame") else v for k, v in extras.items()}
    assert from_extras(matcher, torn) is None
    assert from_extras(matcher, {}) is None


@torch.no_grad()
def test_efficientloftr_counts_equal_transformers(photos: Tensor) -> None:
    """On square images, which need no padding, matches are those of transformers' own forward."""
    model = small_efficientloftr()
    model.config.coarse_matching_border_removal = 0
    matcher = EfficientLoFTRMatcher(model, device=CPU, working_px=64)
    images = torch.cat([grey_photo("motorcycle_left.png", 64, 64), photos[1:2, :, :64, :64]])
    features = matcher.features(images)
    for a, b in ((0, 0), (0, 1), (1, 0)):
        pair = torch.stack([images[a], images[b]])[None].expand(-1, -1, 3, -1, -1)
        truth = model(pixel_values=pair).matching_scores[0, 1]
        one = [matcher.features(images[k, None]) for k in (a, b)]
        mine = matcher.compare(*one).confidence[0]
        assert int((mine > 0).sum()) == int((truth > 0).sum()) > 0
    assert len(features) == 2


def test_efficientloftr_loads_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the name or in the environment gives the weights that were saved."""
    model = small_efficientloftr()
    model.save_pretrained(tmp_path)
    named: Any = load_matcher(f"efficientloftr:{tmp_path}")
    monkeypatch.setenv(matchers.EFFICIENTLOFTR_FOLDER, str(tmp_path))
    found: Any = load_matcher("efficientloftr")
    assert named.digest == found.digest
    name = "efficientloftr.backbone.stages.0.blocks.0.conv1.conv.weight"
    assert torch.equal(found.model.state_dict()[name], model.state_dict()[name])


def test_a_matcher_by_name_runs_in_the_fastest_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime on a CPU, unless it is absent, the precision is reduced, or torch is named."""
    assert isinstance(load_matcher("nano"), OnnxLoFTRMatcher)
    assert isinstance(load_matcher("torch:nano"), LoFTRMatcher)
    assert isinstance(load_matcher("nano", dtype=torch.bfloat16), LoFTRMatcher)
    assert isinstance(load_matcher("sift"), SiftMatcher)
    monkeypatch.setattr(matchers, "find_spec", lambda name: None)
    assert isinstance(load_matcher("nano"), LoFTRMatcher)
    with pytest.raises(MatcherUnavailable, match=r"needs onnxruntime, .* use torch:nano"):
        load_matcher("onnx:nano")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("efficientloftr", "has no weights; name their folder"),
        ("efficientloftr:/nowhere", "holds no config.json; download"),
        ("absent.safetensors", r"absent\.safetensors do not exist; pass"),
        ("onnx:absent.safetensors", "do not exist"),
    ],
)
def test_what_cannot_be_had_is_answered(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refusal names what is missing and what to use."""
    monkeypatch.delenv(matchers.EFFICIENTLOFTR_FOLDER, raising=False)
    with pytest.raises(MatcherUnavailable, match=says):
        load_matcher(name)
