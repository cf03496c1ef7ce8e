"""Capsules: same inputs, same bytes; every changed byte is seen; nothing unsound is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realfill.adapter import Adapter
from realfill.base import Base
from realfill.capsule import (
    Capsule,
    CapsuleHeader,
    digests,
    read_capsule,
    read_header,
    write_capsule,
)
from realfill.capsule_format import pack, unpack
from realfill.errors import AdapterMismatch, InvalidCapsule
from tests.tiny import tiny_base, tiny_capsule

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _header(**changes: Any) -> CapsuleHeader:
    fields: dict[str, Any] = {
        "scene": "tower",
        "base": "nano",
        "base_fingerprint": "0123456789abcdef" * 4,
        "rank": 2,
        "alpha": 4.0,
        "scale": 2.0,
        "target_modules": ("to_q", "to_out.0"),
        "prompt": "a photo of sks",
        "size_px": 128,
        "training": {"configuration": {"steps": 3, "lr": 2e-4}, "report": {"wall_s": 1.5}},
        "digests": {"ref/größe.jpg": "ab" * 32},
        "licence": "RAIL++-M",
    }
    return CapsuleHeader(**{**fields, **changes})


def _capsule(seed: int = 0, dtype: torch.dtype = torch.float16, **changes: Any) -> Capsule:
    """A capsule of a few small tensors of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    header = _header(**changes)
    rank, scale = header.rank, header.scale
    return Capsule(
        header=header,
        adapter=Adapter(
            {name: (draw(rank, 5), draw(7, rank)) for name in ("mid.0.to_q", "up.1.to_out.0")},
            scale,
        ),
        text_adapter=Adapter({"layers.0.q_proj": (draw(rank, 3), draw(3, rank))}, scale),
        prompt_embedding=draw(77, 6),
        extras={
            "uncond_embedding": draw(77, 6),
            "reference_features.0.coarse": draw(4, 3, 2),
            "references.0": torch.full((3, 5, 4), 7, dtype=torch.uint8),
            "thumbnail.target": torch.full((3, 2, 2), 9, dtype=torch.uint8),
        },
    )


def _tensors(capsule: Capsule) -> dict[str, torch.Tensor]:
    """Every tensor of a capsule by a name of its own."""
    tensors = {"prompt": capsule.prompt_embedding, **capsule.extras}
    for part, adapter in (("unet", capsule.adapter), ("text", capsule.text_adapter)):
        for module, pair in adapter.factors.items():
            tensors[f"{part} {module} A"], tensors[f"{part} {module} B"] = pair
    return tensors


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    rank=st.integers(1, 9),
    alpha=st.floats(1e-3, 1e3),
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    steps=st.integers(),
)
def test_capsule_round_trip_is_exact(
    seed: int, dtype: torch.dtype, rank: int, alpha: float, prompt: str, steps: int
) -> None:
    """What is read is bit for bit what was written, and writing it again gives the same bytes."""
    capsule = _capsule(
        seed,
        dtype,
        rank=rank,
        alpha=alpha,
        scale=alpha / rank,
        prompt=prompt,
        training={"steps": steps},
    )
    written = write_capsule(capsule)
    read = read_capsule(written, None)

    assert read.header == capsule.header
    assert read.adapter.scale == alpha / rank
    expected, found = _tensors(capsule), _tensors(read)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert write_capsule(read) == written


def test_write_capsule_does_not_depend_on_order() -> None:
    """Dictionaries filled in another order give the same bytes, every time."""
    capsule = _capsule(training={"a": 1, "b": {"c": 2, "d": 3}})
    shuffled = Capsule(
        header=replace(capsule.header, training={"b": {"d": 3, "c": 2}, "a": 1}),
        adapter=Adapter(dict(reversed(capsule.adapter.factors.items())), capsule.adapter.scale),
        text_adapter=capsule.text_adapter,
        prompt_embedding=capsule.prompt_embedding.t().contiguous().t(),
        extras=dict(reversed(capsule.extras.items())),
    )

    assert write_capsule(shuffled) == write_capsule(capsule)
    assert len({write_capsule(capsule) for _ in range(20)}) == 1


def test_capsule_is_a_plain_safetensors_file() -> None:
    """The safetensors library reads the same tensors under the documented names."""
    capsule = _capsule()
    tensors = safetensors.torch.load(write_capsule(capsule))

    assert sorted(tensors) == [
        "prompt_embedding",
        "reference_features.0.coarse",
        "references.0",
        "text_encoder.layers.0.q_proj.lora_A",
        "text_encoder.layers.0.q_proj.lora_B",
        "thumbnail.target",
        "uncond_embedding",
        "unet.mid.0.to_q.lora_A",
        "unet.mid.0.to_q.lora_B",
        "unet.up.1.to_out.0.lora_A",
        "unet.up.1.to_out.0.lora_B",
    ]
    lora_a = capsule.adapter.factors["mid.0.to_q"][0]
    assert torch.equal(tensors["unet.mid.0.to_q.lora_A"], lora_a)


def test_capsule_metadata_has_the_documented_keys() -> None:
    """Values are texts; keys are sorted in the file."""
    metadata = unpack(write_capsule(_capsule())).metadata

    assert list(metadata) == sorted(metadata)
    assert metadata["realfill.format"] == "1"
    assert metadata["realfill.rank"] == "2"
    assert metadata["realfill.scale"] == "2.0"
    assert metadata["realfill.target_modules"] == '["to_q","to_out.0"]'
    assert json.loads(metadata["realfill.digests"]) == {"ref/größe.jpg": "ab" * 32}
    assert metadata["modelspec.architecture"] == "realfill-nano/lora"
    assert metadata["modelspec.title"] == "tower"


def test_training_digest_is_that_of_the_configuration() -> None:
    """The report, which holds times, does not change it; the configuration does."""
    first = _header(training={"configuration": {"steps": 3}, "report": {"wall_s": 1}})
    second = _header(training={"report": {"wall_s": 2}, "configuration": {"steps": 3}})
    third = _header(training={"configuration": {"steps": 4}})

    assert first.training_digest == hashlib.sha256(b'{"steps":3}').hexdigest()
    assert first.training_digest == second.training_digest
    assert first.training_digest != third.training_digest


def test_digests_are_of_the_file_and_of_the_tensors() -> None:
    """A change of the header moves the first and leaves the second."""
    data, relabelled = write_capsule(_capsule()), write_capsule(_capsule(scene="bridge"))
    file_digest, tensor_digest = digests(data)

    assert file_digest == hashlib.sha256(data).hexdigest()
    assert tensor_digest == hashlib.sha256(unpack(data).region).hexdigest()
    assert digests(relabelled)[0] != file_digest
    assert digests(relabelled)[1] == tensor_digest


def test_read_header_touches_no_tensor() -> None:
    """A header is read although a tensor is damaged, and knows the shapes."""
    data = bytearray(write_capsule(_capsule()))
    data[-1] ^= 1
    header = read_header(memoryview(data))

    assert header == _header()
    assert header.shapes["unet.mid.0.to_q.lora_A"] == (2, 5)
    with pytest.raises(InvalidCapsule, match=r"tensors are not the ones that were written"):
        read_capsule(bytes(data), None)


def test_every_flipped_byte_of_the_header_is_seen() -> None:
    """Whichever byte changes, the length included, reading the header fails."""
    data = write_capsule(_capsule())
    size = 8 + int.from_bytes(data[:8], "little")
    for position in range(size):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(InvalidCapsule):
            read_header(bytes(damaged))


def _forged(edit: Any) -> bytes:
    """A capsule whose header was changed by someone who knows how its digest is made."""
    data = write_capsule(_capsule())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    metadata = header["__metadata__"]
    del metadata["realfill.header_digest"]
    text = json.dumps(header, sort_keys=True)
    metadata["realfill.header_digest"] = hashlib.sha256(text.encode()).hexdigest()
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("realfill.format", "2", r"format 2, this program reads 1"),
        ("realfill.rank", "0", r"rank 0, not within 1\.\.128"),
        ("realfill.rank", "129", r"rank 129, not within 1\.\.128"),
        ("realfill.rank", "two", r"cannot be read \(invalid literal"),
        ("realfill.rank", "3", r"scale 2\.0, not alpha / rank = 4\.0/3"),
        ("realfill.alpha", "nan", r"alpha nan"),
        ("realfill.scale", "inf", r"scale inf"),
        ("realfill.base_fingerprint", "xyz", r"fingerprint 'xyz', not 64 hex digits"),
        ("realfill.size_px", "-1", r"size -1 px"),
        ("realfill.scene", " ", r"no scene name"),
        ("realfill.training", "[]", r"are JSON objects"),
        ("realfill.digests", '{"a":1}', r"are JSON objects"),
        ("realfill.target_modules", '"to_q"', r"JSON list"),
        ("realfill.training_digest", "0", r"training digest belongs to another"),
        ("realfill.surprise", "1", r"unknown key realfill\.surprise"),
        ("realfill.licence", None, r"no realfill\.licence"),
    ],
)
def test_forged_metadata_is_refused(key: str, value: str | None, message: str) -> None:
    """Every value is checked, not only the digest over them."""

    def edit(header: dict[str, Any]) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    with pytest.raises(InvalidCapsule, match=message):
        read_header(_forged(edit))


def test_metadata_of_other_namespaces_is_left_alone() -> None:
    """Other tools may add keys of their own."""
    data = _forged(lambda header: header["__metadata__"].update({"ss_tag": "holiday"}))

    assert read_header(data) == _header()


@pytest.mark.parametrize(
    "tensors,message",
    [
        ({"unet.a.lora_A": (2, 3)}, r"unet\.a are \[2, 3\] and None"),
        ({"unet.a.lora_A": (2, 3), "unet.a.lora_B": (3, 4)}, r"and \[3, 4\], at rank 2"),
        ({"unet.a.lora_A": (4, 3), "unet.a.lora_B": (3, 4)}, r"\[4, 3\].*at rank 2"),
        ({"unet.a.lora_A": (2, 3, 1), "unet.a.lora_B": (3, 2)}, r"\[2, 3, 1\]"),
        ({"text_encoder.a.lora_A": (2, 3), "text_encoder.a.lora_B": (3, 2)}, r"no unet adapter"),
        ({"prompt_embedding": (76, 6)}, r"prompt_embedding is \[76, 6\].*\[77, d\]"),
        ({"weights": (1,)}, r"unknown tensor 'weights'"),
        ({"unet.a/../b.lora_A": (2, 3)}, r"unknown tensor"),
        ({"reference_features": (1,)}, r"unknown tensor"),
    ],
)
def test_unsound_tensors_are_refused(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    """Names are known, pairs complete, shapes of the header's rank."""
    complete = {"prompt_embedding": torch.zeros(77, 6)}
    complete |= {name: torch.zeros(shape) for name, shape in tensors.items()}
    data = pack(complete, unpack(write_capsule(_capsule())).metadata)
    with pytest.raises(InvalidCapsule, match=message):
        read_header(data)


def test_a_capsule_without_prompt_embedding_is_refused() -> None:
    """Serving has no text encoder to make one."""
    tensors = {"unet.a.lora_A": torch.zeros(2, 3), "unet.a.lora_B": torch.zeros(3, 2)}
    data = pack(tensors, unpack(write_capsule(_capsule())).metadata)
    with pytest.raises(InvalidCapsule, match=r"no prompt_embedding"):
        read_header(data)


def test_bytes_are_for_pictures_only() -> None:
    """A factor of whole numbers is no factor."""
    capsule = _capsule()
    lora_a, lora_b = capsule.adapter.factors["mid.0.to_q"]
    capsule.adapter.factors["mid.0.to_q"] = lora_a.to(torch.uint8), lora_b
    with pytest.raises(InvalidCapsule, match=r"to_q\.lora_A is U8"):
        write_capsule(capsule)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype) -> None:
    """Neither writing nor reading lets one pass, even where all digests fit."""
    capsule = _capsule(dtype=dtype)
    capsule.adapter.factors["mid.0.to_q"][1][3, 1] = value
    with pytest.raises(InvalidCapsule, match=r"to_q\.lora_B holds values that are not finite"):
        write_capsule(capsule)


def test_write_capsule_refuses_what_has_no_place_in_the_file() -> None:
    """Unknown extras, foreign dtypes, two scales and values beyond JSON are named."""
    capsule = _capsule()
    with pytest.raises(InvalidCapsule, match=r"unknown tensor 'surprise'"):
        write_capsule(replace(capsule, extras={"surprise": torch.zeros(1)}))
    with pytest.raises(InvalidCapsule, match=r"thumbnail\.a is torch\.int64: convert it"):
        write_capsule(replace(capsule, extras={"thumbnail.a": torch.zeros(1, dtype=torch.long)}))
    with pytest.raises(InvalidCapsule, match=r"unet adapter has scale 1\.0, the header 2\.0"):
        write_capsule(replace(capsule, adapter=Adapter(capsule.adapter.factors, 1.0)))
    with pytest.raises(InvalidCapsule, match=r"cannot be written as JSON"):
        write_capsule(replace(capsule, header=_header(training={"loss": float("nan")})))
    with pytest.raises(InvalidCapsule, match=r"not valid Unicode"):
        write_capsule(replace(capsule, header=_header(prompt="\ud800")))


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny base of seed 0."""
    return tiny_base()


def test_read_capsule_fits_the_base_it_was_trained_for(base: Base) -> None:
    """Every factor has the shape of its module's weight."""
    capsule = read_capsule(tiny_capsule(base), base)

    assert capsule.header.base_fingerprint == base.fingerprint
    assert len(capsule.adapter.factors) > 0
    for module, (lora_a, lora_b) in capsule.adapter.factors.items():
        weight = base.unet.get_submodule(module).weight
        assert (lora_b @ lora_a).shape == weight.flatten(1).shape


def test_read_capsule_refuses_another_base(base: Base) -> None:
    """Both fingerprints and the remedy are named."""
    other = tiny_base(seed=1)
    with pytest.raises(
        AdapterMismatch,
        match=rf"{base.fingerprint[:12]}.*{other.fingerprint[:12]}.*train the scene again",
    ):
        read_capsule(tiny_capsule(base), other)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (
            lambda c, m: c.adapter.factors.update({m: (torch.ones(4, 3), torch.ones(3, 4))}),
            "weight is",
        ),
        (
            lambda c, m: c.adapter.factors.update(
                {"no.such": (torch.ones(4, 3), torch.ones(3, 4))}
            ),
            r"no weight matrix unet\.no\.such",
        ),
        (
            lambda c, m: c.adapter.factors.update(
                {"conv_in": (torch.ones(4, 9), torch.ones(16, 4))}
            ),
            r"unet\.conv_in",
        ),
        (
            lambda c, m: c.text_adapter.factors.update({"x": (torch.ones(4, 3), torch.ones(3, 4))}),
            r"no weight matrix text_encoder\.x",
        ),
        (
            lambda c, m: c.extras.update({"uncond_embedding": torch.ones(77, 5)}),
            r"uncond_embedding is 5 wide, the base's prompts are 16",
        ),
    ],
)
def test_read_capsule_refuses_shapes_that_do_not_fit(base: Base, spoil: Any, message: str) -> None:
    """A right fingerprint does not excuse a wrong module, shape or prompt width."""
    capsule = read_capsule(tiny_capsule(base), base)
    spoil(capsule, next(iter(capsule.adapter.factors)))
    data = write_capsule(capsule)
    with pytest.raises(AdapterMismatch, match=message):
        read_capsule(data, base)
