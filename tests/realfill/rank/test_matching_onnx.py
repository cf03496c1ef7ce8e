"""ONNX Runtime finds what torch and plain kornia find."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnxruntime
import pytest
import torch
from kornia.feature.loftr.loftr import default_cfg

from realfill.errors import MatcherUnavailable
from realfill.nano.pretrain_matcher import CONFIG
from realfill.rank import matching_onnx
from realfill.rank.matching import loftr
from realfill.rank.matching_onnx import OnnxLoFTRMatcher, met_graph, onnx_loftr, tokens_graph
from realfill.rank.onnx_graph import _field, _varint
from tests.realfill.rank.pictures import (
    PHOTOS,
    coarse,
    grey_photo,
    plain_loftr,
    plain_nano,
    shifted_pairs,
    with_threshold,
)


@pytest.mark.parametrize(("base", "threshold"), [(default_cfg, 1e-3), (CONFIG, 2e-2)])
@torch.no_grad()
def test_matches_equal_plain_kornia(base: dict[str, Any], threshold: float) -> None:
    """Points and counts equal ``LoFTR.forward`` pair by pair, in both configurations."""
    plain = plain_loftr(with_threshold(base, threshold))
    matcher = OnnxLoFTRMatcher(coarse(plain))
    images0, images1 = shifted_pairs(64, 96)
    found = matcher.match(matcher.features(images0), matcher.features(images1))
    for pair in range(3):
        truth = plain({"image0": images0[pair, None], "image1": images1[pair, None]})
        mine = found.of_pair(pair)
        assert len(mine) == len(truth["confidence"]) > 0
        assert torch.equal(mine.points0, truth["keypoints0"])
        torch.testing.assert_close(mine.confidence, truth["confidence"], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_images_of_two_sizes_give_the_tokens_that_torch_gives() -> None:
    """Both graphs, for a size each, are the torch network up to rounding."""
    torch_matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    matcher = OnnxLoFTRMatcher(torch_matcher)
    images0, _ = shifted_pairs(64, 96)
    pairs = images0, images0[..., 8:56, 16:].contiguous()
    features = [matcher.features(images) for images in pairs]
    for mine, images in zip(features, pairs, strict=True):
        truth = torch_matcher.features(images)
        assert mine.grid == truth.grid
        torch.testing.assert_close(mine.tokens, truth.tokens, rtol=1e-4, atol=1e-4)
    mine, truth = (m.compare(*features) for m in (matcher, torch_matcher))
    assert (truth.confidence > 0).any()
    torch.testing.assert_close(mine.confidence, truth.confidence, rtol=1e-3, atol=1e-5)


@pytest.mark.weights
@torch.no_grad()
def test_nano_counts_equal_plain_kornia_on_photographs() -> None:
    """Every pair of real photographs, an image with itself included, in all three programs."""
    plain = plain_nano()
    photos = torch.cat([grey_photo(name) for name in PHOTOS])
    truth = [
        [len(plain({"image0": a[None], "image1": b[None]})["confidence"]) for b in photos]
        for a in photos
    ]
    assert truth[0][1] > 5 * truth[0][2]
    for matcher in (loftr("nano"), onnx_loftr("nano")):
        features = matcher.features(photos)
        for column in range(len(photos)):
            one = matcher.features(photos[column, None])
            counts = (matcher.compare(features, one).confidence > 0).sum(1)
            assert counts.tolist() == [row[column] for row in truth]


def test_sessions_are_kept_by_shape_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shape opens nothing anew; beyond the bound the oldest goes."""
    opened = []
    real = matching_onnx._open
    monkeypatch.setattr(matching_onnx, "_open", lambda *a: opened.append(1) or real(*a))
    monkeypatch.setattr(matching_onnx, "MAX_SESSIONS", 2)
    matcher = OnnxLoFTRMatcher(coarse(plain_loftr(with_threshold(CONFIG, 2e-2))))
    for side in (32, 40, 32, 48, 40):
        matcher.features(torch.zeros(1, 1, side, 32))
    assert len(opened) == 4
    assert len(matcher._sessions) == 2


def test_chunks_do_not_change_the_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs matched one by one give what they give together."""
    matcher = OnnxLoFTRMatcher(coarse(plain_loftr(with_threshold(CONFIG, 2e-2))))
    images0, images1 = shifted_pairs(64, 64)
    together = matcher.match(matcher.features(images0), matcher.features(images1))
    monkeypatch.setattr(matching_onnx, "CHUNK_CELLS", {"cpu": 1})
    monkeypatch.setattr(matching_onnx, "CHUNK_PX", {"cpu": 1})
    alone = matcher.match(matcher.features(images0), matcher.features(images1))
    assert len(together) > 0
    assert torch.equal(together.pair, alone.pair)
    assert torch.equal(together.points1, alone.points1)


def test_features_of_torch_serve_here_too() -> None:
    """One digest, so that what a capsule keeps fits both programs."""
    torch_matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    matcher = OnnxLoFTRMatcher(torch_matcher)
    assert matcher.digest == torch_matcher.digest
    assert matcher.name == "test-onnx"


def test_torch_keeps_its_threads() -> None:
    """Threads that work alone change the number neither here nor in threads that begin later."""
    before = torch.get_num_threads()
    matcher = OnnxLoFTRMatcher(coarse(plain_loftr(with_threshold(CONFIG, 2e-2))))
    assert torch.get_num_threads() == before
    assert matcher._pool.submit(torch.get_num_threads).result() == 1
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before


def test_graphs_have_the_same_bytes_again() -> None:
    """Equal weights and shapes give equal files."""
    net = coarse(plain_loftr(with_threshold(CONFIG, 2e-2))).net
    assert tokens_graph(net, 1, (4, 5)) == tokens_graph(net, 1, (4, 5))
    assert met_graph(net, 2, 20, 30) == met_graph(net, 2, 20, 30)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, b"\x00"), (127, b"\x7f"), (150, b"\x96\x01"), (-1, b"\xff" * 9 + b"\x01")],
)
def test_numbers_are_encoded_as_protobuf_says(value: int, encoded: bytes) -> None:
    """The examples of protobuf's own documentation."""
    assert _varint(value) == encoded
    assert _field(2, "testing") == b"\x12\x07testing"


def test_a_device_without_provider_is_answered() -> None:
    """What ONNX Runtime cannot run on is said, with the way out."""
    matcher = coarse(plain_loftr(with_threshold(CONFIG, 2e-2)))
    matcher.device = torch.device("meta")
    with pytest.raises(MatcherUnavailable, match=r"cannot run on meta .* use the torch matcher"):
        OnnxLoFTRMatcher(matcher)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_cuda_libraries_are_answered() -> None:
    """A provider that is named but cannot start does not fall back in silence."""
    model = tokens_graph(coarse(plain_loftr(with_threshold(CONFIG, 2e-2))).net, 1, (4, 4))
    with pytest.raises(MatcherUnavailable, match="could not start CUDAExecutionProvider"):
        matching_onnx._open(model, ("CUDAExecutionProvider", {"device_id": 0}), 1)


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="ONNX Runtime is not that for GPUs here",
)
@torch.no_grad()
def test_cuda_provider_finds_what_torch_finds() -> None:
    """On the device's memory, through IO binding."""
    torch_matcher, matcher = loftr("nano", "cuda"), onnx_loftr("nano", "cuda")
    photos = torch.cat([grey_photo(name) for name in PHOTOS]).cuda()
    counts = [
        (m.compare(m.features(photos), m.features(photos[:1])).confidence > 0).sum(1)
        for m in (torch_matcher, matcher)
    ]
    # TF32 convolutions of the provider move counts a little.
    assert (counts[0] - counts[1]).abs().max() <= 0.02 * counts[0].max()
