"""Metrics on values worked out by hand, and networks of random weights in their real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from benchmarks.quality.metric import NETWORKS, MetricUnavailable, metrics_of
from benchmarks.quality.perceptual import (
    ALEXNET,
    alexnet_features,
    in_hole,
    lpips_map,
)
from realfill.errors import InvalidScene


def lpips_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of LPIPS with AlexNet."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))
    state = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45]).view(1, 3, 1, 1),
    }
    for k, ((name, *_), (out, into, side)) in enumerate(zip(ALEXNET, shapes, strict=True)):
        weight = torch.randn(out, into, side, side, generator=generator)
        state[f"{name}.weight"] = weight / (into * side * side) ** 0.5
        state[f"{name}.bias"] = torch.zeros(out)
        state[f"lin{k}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return state


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and a hole in its upper left quarter."""
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    hole = torch.zeros(64, 64)
    hole[:32, :32] = 1
    return picture, hole


def test_a_map_is_averaged_over_the_hole_alone() -> None:
    """Of 1, 2, 3, 4 only the 2 and the 4 are missing: 3, and not 1.5 with zeros averaged in."""
    distances = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert in_hole(distances, torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == 3
    assert in_hole(distances, torch.ones(2, 2)) == 2.5


def test_an_empty_or_foreign_hole_is_refused() -> None:
    """Nothing to average, or another size."""
    with pytest.raises(InvalidScene, match="empty"):
        in_hole(torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(InvalidScene, match="one height and width"):
        in_hole(torch.ones(2, 2), torch.ones(2, 3))


def test_lpips_of_two_channels_by_hand() -> None:
    """Unit vectors (0.6, 0.8) and (1, 0), weights 2 and 3: 2 * 0.16 + 3 * 0.64, plus nothing."""
    first = torch.tensor([[[3.0, 0.0]], [[4.0, 5.0]]])
    second = torch.tensor([[[7.0, 0.0]], [[0.0, 9.0]]])
    distances = lpips_map([first], [second], [torch.tensor([2.0, 3.0])], (1, 2))
    assert distances[0].tolist() == pytest.approx([2 * 0.16 + 3 * 0.64, 0.0])
    doubled = lpips_map([first] * 2, [second] * 2, [torch.tensor([2.0, 3.0])] * 2, (1, 2))
    assert torch.allclose(doubled, 2 * distances)


def test_alexnet_has_its_sizes_and_rectifies() -> None:
    """At 64 px: 15, 7, 3, 3 and 3 cells a side, nothing below zero."""
    features = alexnet_features(pictures()[0], lpips_state())
    assert [tuple(f.shape) for f in features] == [
        (64, 15, 15),
        (192, 7, 7),
        (384, 3, 3),
        (256, 3, 3),
        (256, 3, 3),
    ]
    assert all(float(f.min()) == 0 for f in features)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_lpips_is_zero_for_equals_and_blind_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A change far from the hole weighs far less than the same change inside."""
    path = tmp_path / f"lpips{suffix}"
    save_file(lpips_state(), path) if suffix == ".safetensors" else torch.save(lpips_state(), path)
    monkeypatch.setenv("REALFILL_LPIPS", str(path))
    metric = metrics_of(["lpips"])[-1]
    picture, hole = pictures()
    inside, outside = picture.clone(), picture.clone()
    inside[:, 4:12, 4:12] = 0
    outside[:, 52:60, 52:60] = 0
    assert metric.measure(picture, picture, hole) == 0
    near, far = (metric.measure(x, picture, hole) for x in (inside, outside))
    assert near > 3 * far
    assert not metric.higher_is_better


def test_dino_and_clip_are_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 for equal pictures, less for others; tiny models in folders as transformers writes them."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 224, "patch_size": 32}
    # Far larger than usual, so that two noises look different to it.
    sizes |= {"initializer_range": 1.0}
    models = {
        "dino": ViTModel(ViTConfig(**sizes), add_pooling_layer=False),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=8)),
    }
    picture, hole = pictures()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(settings))
        monkeypatch.setenv(NETWORKS[name].variable, str(tmp_path / name))
        metric = metrics_of([name])[-1]
        assert metric.measure(picture, picture, hole) == pytest.approx(1)
        assert metric.measure(1 - picture.flip(1), picture, hole) < 0.999
        assert metric.higher_is_better


def test_psnr_and_ssim_are_always_there() -> None:
    """An error of 0.1 in the hole is 20 dB, whatever lies outside."""
    psnr_db, ssim = metrics_of([])
    picture, hole = pictures()
    off = torch.where(hole > 0, picture * 0 + 0.6, picture * 0)
    assert psnr_db.measure(off, picture * 0 + 0.5, hole) == pytest.approx(20, abs=1e-4)
    assert ssim.measure(picture, picture, hole) == pytest.approx(1)


def test_what_is_missing_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such metric, no weights, no package."""
    monkeypatch.delenv("REALFILL_LPIPS", raising=False)
    with pytest.raises(MetricUnavailable, match="set REALFILL_LPIPS to the state of"):
        metrics_of(["lpips"])
    with pytest.raises(MetricUnavailable, match="choose of lpips, dreamsim"):
        metrics_of(["fid"])
    with pytest.raises(MetricUnavailable, match="dreamsim, which is not installed: install it"):
        metrics_of(["dreamsim"])
