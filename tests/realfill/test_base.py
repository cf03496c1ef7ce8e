"""Bases: loading, saving, fingerprints and refusals."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from realfill.base import (
    NANO_FOLDER,
    attention_for_training,
    load_base,
    save_base,
    target_layers,
)
from realfill.errors import BaseUnavailable
from realfill.fingerprint import fingerprint_of, fingerprint_of_folder
from tests.tiny import save_tiny_base, tiny_base


def test_saved_base_loads_with_the_same_fingerprint_and_outputs(tmp_path: Path) -> None:
    """A base that went through a folder is the same base."""
    base = tiny_base()
    loaded = load_base(str(save_tiny_base(tmp_path / "tiny")))
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert loaded.fingerprint == base.fingerprint
    assert (loaded.size_px, loaded.cell_px, loaded.latent_channels) == (32, 8, 4)
    assert torch.equal(loaded.encode(pixels), base.encode(pixels))
    assert torch.equal(loaded.embed(), base.embed())


def test_fingerprint_changes_with_one_weight(tmp_path: Path) -> None:
    """One changed value in any part gives another fingerprint."""
    base = tiny_base()
    save_base(base, tmp_path / "a", dtype=torch.float32)
    before = fingerprint_of_folder(tmp_path / "a")
    with torch.no_grad():
        next(base.text_encoder.parameters()).view(-1)[0] += 1
    save_base(base, tmp_path / "b", dtype=torch.float32)
    assert fingerprint_of_folder(tmp_path / "b") != before


def test_fingerprint_does_not_depend_on_the_loaded_dtype(tmp_path: Path) -> None:
    """The fingerprint is of the file: a bfloat16 server serves what a float32 trainer made."""
    folder = str(save_tiny_base(tmp_path / "tiny"))
    assert load_base(folder, dtype=torch.bfloat16).fingerprint == load_base(folder).fingerprint


def test_posterior_is_sampled_only_with_a_generator() -> None:
    """Without a generator encoding is deterministic; with one it varies."""
    base, pixels = tiny_base(), torch.rand(1, 3, 32, 32)
    mode = base.encode(pixels)
    assert torch.equal(mode, base.encode(pixels))
    assert not torch.equal(mode, base.encode(pixels, torch.Generator().manual_seed(1)))


def test_base_without_a_part_is_refused(tmp_path: Path) -> None:
    """The sentence names the missing part."""
    folder = save_tiny_base(tmp_path / "tiny")
    for path in (folder / "vae").iterdir():
        path.unlink()
    (folder / "vae").rmdir()
    with pytest.raises(BaseUnavailable, match="has no vae"):
        load_base(str(folder))


def test_base_without_weights_is_refused(tmp_path: Path) -> None:
    """A folder with a configuration but no safetensors names the remedy."""
    folder = save_tiny_base(tmp_path / "tiny")
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises((BaseUnavailable, OSError)):
        load_base(str(folder))


def test_text_to_image_base_is_refused(tmp_path: Path) -> None:
    """A U-Net that takes no mask is no inpainting model."""
    folder = save_tiny_base(tmp_path / "tiny")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["in_channels"] = 4
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseUnavailable, match="no inpainting model"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "nothing", "a/b/c"])
def test_unknown_base_is_refused(name: str) -> None:
    """A name that is no folder and no hub id says what may be given."""
    with pytest.raises(BaseUnavailable, match="No base"):
        load_base(name)


def test_hub_base_offline_is_refused_in_one_sentence() -> None:
    """Without a network a hub id is refused, not crashed on."""
    with pytest.raises(BaseUnavailable, match="could not be fetched"):
        load_base("nobody/nothing-at-all")


def test_nano_is_small_and_whole() -> None:
    """All shipped weights together are at most 28 MB, and the base works at 128 px."""
    weights = NANO_FOLDER.parent
    assert sum(path.stat().st_size for path in weights.rglob("*.safetensors")) <= 28_000_000
    nano = load_base("nano")
    assert (nano.size_px, nano.cell_px) == (128, 8)
    assert nano.scheduler.config.prediction_type == "v_prediction"
    assert nano.embed().shape == (77, 64)


def test_fingerprint_does_not_depend_on_the_memory_format() -> None:
    """Channels-last weights are the same weights."""
    base = tiny_base()
    before = fingerprint_of({"unet": base.unet})
    assert fingerprint_of({"unet": base.unet.to(memory_format=torch.channels_last)}) == before


def test_target_layers_are_linear_or_convolutions_under_whole_names() -> None:
    """A suffix is whole parts of a path, and what has no weight matrix is left out."""
    network = nn.ModuleDict(
        {
            "to_q": nn.Linear(2, 2),
            "add_to_q": nn.Linear(2, 2),
            "block": nn.ModuleDict({"conv1": nn.Conv2d(2, 2, 3), "to_q": nn.GroupNorm(1, 2)}),
        }
    )
    assert list(target_layers(network, ("to_q", "conv1"))) == ["to_q", "block.conv1"]
    assert list(target_layers(network, ("block.conv1",))) == ["block.conv1"]


def test_attention_for_training_gives_the_same_gradients_and_is_taken_off() -> None:
    """Plain products are the same function; afterwards the processors are what they were."""
    base = tiny_base()
    inputs = torch.randn(1, 9, 4, 4), torch.tensor([500]), base.embed()[None]
    query = base.unet.get_submodule(next(iter(target_layers(base.unet, ("to_q",)))))
    query.requires_grad_(True)
    before = base.unet.attn_processors
    gradients = []
    for around in (nullcontext(), attention_for_training(base.unet)):
        with around:
            base.unet(*inputs).sample.square().sum().backward()
        gradients.append(query.weight.grad)
        query.weight.grad = None
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert base.unet.attn_processors == before
