"""Capsules to and from the files of PEFT, diffusers and kohya, loaded by those programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from realfill.adapter import Adapter
from realfill.base import PAPER_TEXT_MODULES, PROMPT, Base, target_layers
from realfill.capsule import read_capsule, write_capsule
from realfill.errors import AdapterMismatch, InvalidCapsule
from realfill.interchange import COMPANION, export_capsule, import_capsule
from realfill.lora_files import Kind
from service.engine.swap import Swapper
from tests.tiny import tiny_base, tiny_capsule

KINDS: tuple[Kind, ...] = ("peft", "diffusers", "kohya")


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


@pytest.fixture(scope="module")
def capsule(base: Base) -> bytes:
    """A capsule that adapts attention, convolutions and the text encoder."""
    plain = read_capsule(tiny_capsule(base), base)
    generator = torch.Generator().manual_seed(7)
    factors = {}
    for path, layer in target_layers(base.text_encoder, PAPER_TEXT_MODULES).items():
        rows, columns = layer.weight.shape
        lora_a = torch.randn(4, columns, generator=generator).half()
        factors[path] = lora_a, torch.randn(rows, 4, generator=generator).half()
    return write_capsule(replace(plain, text_adapter=Adapter(factors, 2.0)))


def place_of(folder: Path, kind: Kind) -> Path:
    """Where an export of a kind goes."""
    return folder / ("tower.safetensors" if kind == "kohya" else "tower")


def weights_of(place: Path) -> dict[str, Tensor]:
    """Every tensor of an export, by file and name; the companion left out."""
    files = [place] if place.is_file() else sorted(place.rglob("*.safetensors"))
    return {
        f"{file.relative_to(place.parent)} {name}": tensor
        for file in files
        if not file.name.endswith(COMPANION)
        for name, tensor in load_file(file).items()
    }


def same_bits(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two files of tensors agree in names, types, shapes and bits."""
    return ones.keys() == others.keys() and all(
        one.dtype == others[name].dtype and torch.equal(one, others[name])
        for name, one in ones.items()
    )


def inputs(base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy latent with mask and masked latent, its timestep and a prompt."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 9, 4, 4, generator=generator)
    return latents, torch.tensor([10, 700]), base.embed(PROMPT).expand(2, -1, -1)


def loaded(place: Path, kind: Kind) -> Any:
    """A fresh U-Net with the adapter that PEFT or diffusers reads from an export."""
    fresh = tiny_base()
    if kind == "peft":
        return PeftModel.from_pretrained(fresh.unet, str(place / "unet")).eval()
    pipeline = StableDiffusionInpaintPipeline(
        vae=fresh.autoencoder,
        text_encoder=fresh.text_encoder,
        tokenizer=fresh.tokenizer,
        unet=fresh.unet,
        scheduler=fresh.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(
        str(place.parent if place.is_file() else place),
        **({"weight_name": place.name} if place.is_file() else {}),
    )
    return pipeline.unet


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_with_its_companion_gives_the_same_bytes(
    base: Base, capsule: bytes, tmp_path: Path, kind: Kind
) -> None:
    """Capsule to files and back: every byte."""
    place = place_of(tmp_path, kind)
    assert export_capsule(capsule, place, kind, base).is_file()
    assert import_capsule(place, base) == capsule


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_a_companion_come_back_bit_for_bit(
    base: Base, capsule: bytes, tmp_path: Path, kind: Kind
) -> None:
    """Files to capsule and back: every tensor's name, type, shape and bits."""
    (tmp_path / "again").mkdir()
    first, second = place_of(tmp_path, kind), place_of(tmp_path / "again", kind)
    export_capsule(capsule, first, kind, base).unlink()
    made = import_capsule(first, base, scene="bridge")
    export_capsule(made, second, kind, base)
    assert same_bits(weights_of(first), weights_of(second))
    header = read_capsule(made, base).header
    assert (header.scene, header.rank, header.alpha) == ("bridge", 4, 8.0)
    assert header.target_modules == tuple(sorted(base.adapter_modules))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_output_of_the_fused_capsule(
    base: Base, capsule: bytes, tmp_path: Path, kind: Kind
) -> None:
    """PEFT and diffusers load the files, and the U-Net answers as with the capsule fused."""
    place = place_of(tmp_path, kind)
    export_capsule(capsule, place, kind, base)
    served = tiny_base()
    swapper = Swapper(served.unet, served.adapter_modules)
    with torch.no_grad():
        plain = served.unet(*inputs(base)).sample
        swapper.apply("d" * 64, read_capsule(capsule, served).adapter)
        fused = served.unet(*inputs(base)).sample
        other = loaded(place, kind)(*inputs(base)).sample
    assert (fused - plain).abs().max() > 0.1
    torch.testing.assert_close(other, fused, rtol=1e-4, atol=1e-4)


def test_the_text_adapter_reaches_the_prompt(base: Base, capsule: bytes, tmp_path: Path) -> None:
    """Without a companion the embedding is that of PEFT's adapted text encoder."""
    export_capsule(capsule, tmp_path / "tower", "peft", base).unlink()
    before = {name: tensor.clone() for name, tensor in base.text_encoder.state_dict().items()}
    made = read_capsule(import_capsule(tmp_path / "tower", base, scene="tower"), base)
    assert same_bits(before, base.text_encoder.state_dict())
    fresh = tiny_base()
    fresh.text_encoder.load_adapter(str(tmp_path / "tower" / "text_encoder"))
    with torch.no_grad():
        expected = fresh.embed(PROMPT)
    torch.testing.assert_close(made.prompt_embedding.float(), expected, rtol=2e-3, atol=2e-3)
    assert (expected - base.embed(PROMPT)).abs().max() > 0.1


def test_old_diffusers_names_are_read(base: Base, capsule: bytes, tmp_path: Path) -> None:
    """Factors that hang on attention processors, with alphas as tensors."""
    adapter = read_capsule(capsule, base).adapter
    old = {}
    for path, (lora_a, lora_b) in adapter.factors.items():
        if path.endswith("conv1"):
            continue
        block, _, leaf = path.removesuffix(".0").rpartition(".")
        name = f"unet.{block}.processor.{leaf}_lora"
        old |= {f"{name}.down.weight": lora_a, f"{name}.up.weight": lora_b}
        old[f"{name}.alpha"] = torch.tensor(8.0)
    save_file(old, tmp_path / "old.safetensors")
    made = read_capsule(import_capsule(tmp_path / "old.safetensors", base, scene="tower"), base)
    assert made.header.scale == 2.0
    expected = {path: pair for path, pair in adapter.factors.items() if "conv1" not in path}
    assert made.adapter.factors.keys() == expected.keys()
    assert all(
        torch.equal(one, other)
        for path in expected
        for one, other in zip(expected[path], made.adapter.factors[path], strict=True)
    )


def test_alpha_is_the_rank_where_nothing_names_it(
    base: Base, capsule: bytes, tmp_path: Path
) -> None:
    """As diffusers and kohya take it."""
    export_capsule(capsule, tmp_path / "tower.safetensors", "kohya", base).unlink()
    tensors = load_file(tmp_path / "tower.safetensors")
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith("alpha")}
    save_file(bare, tmp_path / "tower.safetensors")
    made = import_capsule(tmp_path / "tower.safetensors", base, scene="tower")
    assert read_capsule(made, base).header.scale == 1.0


def test_changed_factors_do_not_pass_for_the_old_capsule(
    base: Base, capsule: bytes, tmp_path: Path
) -> None:
    """The companion knows the digest of the tensors it belongs to."""
    export_capsule(capsule, tmp_path / "tower", "diffusers", base)
    file = tmp_path / "tower" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, file)
    with pytest.raises(InvalidCapsule, match="were changed since they were exported"):
        import_capsule(tmp_path / "tower", base)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True), ("use_rslora", True), ("alpha_pattern", {"to_q": 2}), ("bias", "all"),
        ("use_qalora", True), ("peft_type", "ADALORA"), ("init_lora_weights", "pissa_niter_4"),
    ],
)  # fmt: skip
def test_what_a_capsule_cannot_say_is_refused(
    base: Base, capsule: bytes, tmp_path: Path, option: str, value: object
) -> None:
    """Better no capsule than one that means something else."""
    export_capsule(capsule, tmp_path / "tower", "peft", base)
    file = tmp_path / "tower" / "unet" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(InvalidCapsule, match=f"trained with {option}="):
        import_capsule(tmp_path / "tower", base)


def broken(tensors: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    """The tensors of a kohya file with one fault."""
    name = next(name for name in tensors if name.endswith("lora_down.weight"))
    if fault == "half":
        del tensors[name]
    elif fault == "rank":
        up = name.replace("down", "up")
        tensors |= {name: tensors[name][:2], up: tensors[up][:, :2].contiguous()}
    elif fault == "double":
        tensors[name] = tensors[name].double()
    else:
        tensors[fault] = tensors.pop(name)
    return tensors


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("half", InvalidCapsule, "only one of the two factors"),
        ("rank", InvalidCapsule, r"ranks \[2, 4\]"),
        ("double", InvalidCapsule, "as torch.float64"),
        ("lora_unet_elsewhere.lora_down.weight", AdapterMismatch, "which this base has not"),
        ("lora_unet_mid.hada_w1_a", InvalidCapsule, "no plain LoRA factor"),
    ],
)
def test_a_broken_file_is_refused(
    base: Base, capsule: bytes, tmp_path: Path, fault: str, error: type[Exception], sentence: str
) -> None:
    """One sentence names the fault."""
    file = tmp_path / "tower.safetensors"
    export_capsule(capsule, file, "kohya", base).unlink()
    save_file(broken(load_file(file), fault), file)
    with pytest.raises(error, match=sentence):
        import_capsule(file, base, scene="tower")


def test_files_without_a_scene_need_a_name(base: Base, capsule: bytes, tmp_path: Path) -> None:
    """The remedy names the option."""
    export_capsule(capsule, tmp_path / "tower", "peft", base).unlink()
    with pytest.raises(InvalidCapsule, match="--scene"):
        import_capsule(tmp_path / "tower", base)


def test_other_files_are_refused(base: Base, tmp_path: Path) -> None:
    """An empty folder, and a picture."""
    with pytest.raises(InvalidCapsule, match="give a folder that PEFT or diffusers wrote"):
        import_capsule(tmp_path, base, scene="tower")
    (tmp_path / "photo.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(InvalidCapsule, match="cannot be read"):
        import_capsule(tmp_path / "photo.safetensors", base, scene="tower")


def test_another_base_is_refused(base: Base, capsule: bytes, tmp_path: Path) -> None:
    """The fingerprint decides, before anything is written."""
    with pytest.raises(AdapterMismatch):
        export_capsule(capsule, tmp_path / "tower", "peft", tiny_base(seed=1))
    assert not (tmp_path / "tower").exists()
