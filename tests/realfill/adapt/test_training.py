"""The training loop on a tiny base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import Tensor

from realfill.adapt.lora import drop, factors_in, parameters_of
from realfill.adapt.loss import target_of, timesteps_of, weighted_error
from realfill.adapt.pool import Views, blank, draw, encode
from realfill.adapt.probe import new_probe, reading
from realfill.adapt.training import Record, train
from realfill.base import Base, target_layers
from realfill.capsule import read_capsule
from realfill.complete.windows import crop_mask, window_of
from realfill.config import LoraDropout, TrainingConfig, preset
from realfill.errors import TrainingDiverged
from realfill.scene import Scene
from tests.tiny import tiny_base


@pytest.fixture
def base() -> Base:
    """Random weights, 32 px."""
    return tiny_base()


@pytest.fixture
def scene() -> Scene:
    """Two references and a target with a hole in the middle."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(40, 60)
    mask[10:25, 20:40] = 1
    return Scene(
        name="tower",
        references=(
            torch.rand(3, 50, 40, generator=generator),
            torch.rand(3, 33, 47, generator=generator),
        ),
        target=torch.rand(3, 40, 60, generator=generator),
        mask=mask,
        truth=None,
        digests={"ref/0.png": "ab" * 32},
    )


def small(**changes: object) -> TrainingConfig:
    """A configuration of six steps."""
    values: dict[str, object] = {
        "steps": 6,
        "batch": 4,
        "rank": 4,
        "alpha": 8.0,
        "pool": 8,
        "probe_every": 3,
    }
    return preset("demo", **{**values, **changes})


def last_of(
    base: Base, scene: Scene, config: TrainingConfig, checkpoint: Path | None = None
) -> Record:
    """The last record of a run."""
    *_, record = train(base, scene, config, checkpoint=checkpoint)
    return record


def factors_of(base: Base, record: Record) -> Tensor:
    """All factors of a run's capsule, one behind the other. [F]"""
    assert record.capsule is not None
    pairs = read_capsule(record.capsule, base).adapter.factors.values()
    return torch.cat([factor.float().flatten() for pair in pairs for factor in pair])


def test_same_inputs_give_the_same_bytes_and_leave_the_base_alone(base: Base, scene: Scene) -> None:
    """Two runs on one base end with equal capsules, and the base is what it was."""
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    first, second = (last_of(base, scene, small()).capsule for _ in range(2))
    assert first == second
    after = base.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in base.unet.parameters())


def test_another_seed_gives_another_capsule(base: Base, scene: Scene) -> None:
    """The seed decides the draws."""
    assert last_of(base, scene, small()).capsule != last_of(base, scene, small(seed=1)).capsule


def checkpoints(folder: Path) -> list[Path]:
    """Those that runs have left."""
    return sorted(folder.glob("*.checkpoint"))


def interrupted(
    base: Base, scene: Scene, config: TrainingConfig, checkpoint: Path, step: int
) -> None:
    """A run that is stopped once a step's record is there."""
    run = train(base, scene, config, checkpoint=checkpoint)
    while next(run).step < step:
        pass
    run.close()


@pytest.mark.parametrize("mode", ["layer", "element"])
def test_interrupted_run_resumes_to_the_same_bytes(
    base: Base,
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: LoraDropout,
) -> None:
    """A run that was stopped after its checkpoint ends as if it had not been."""
    monkeypatch.setattr("realfill.adapt.training.CHECKPOINT_EVERY", 2)
    config = small(lora_drop_mode=mode, lora_dropout=0.3, rate_text=1e-3)
    whole = last_of(base, scene, config).capsule
    checkpoint = tmp_path / "run.checkpoint"
    interrupted(base, scene, config, checkpoint, 5)
    assert len(checkpoints(tmp_path)) == 1
    resumed = list(train(base, scene, config, checkpoint=checkpoint))
    assert [record.step for record in resumed] == [5, 6]
    assert resumed[-1].capsule == whole
    assert not checkpoints(tmp_path)


def test_finished_run_keeps_its_checkpoint_until_more_is_asked_for(
    base: Base, scene: Scene, tmp_path: Path
) -> None:
    """Where its capsule could not be written it is made again without a step."""
    checkpoint = tmp_path / "run.checkpoint"
    whole = last_of(base, scene, small()).capsule
    interrupted(base, scene, small(), checkpoint, 6)
    assert len(checkpoints(tmp_path)) == 1
    (again,) = train(base, scene, small(), checkpoint=checkpoint)
    assert again.capsule == whole
    assert not checkpoints(tmp_path)


def test_checkpoint_of_another_configuration_is_left_alone(
    base: Base, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings start from the first step, and the first run can still go on."""
    monkeypatch.setattr("realfill.adapt.training.CHECKPOINT_EVERY", 2)
    checkpoint = tmp_path / "run.checkpoint"
    interrupted(base, scene, small(), checkpoint, 3)
    other = list(train(base, scene, small(rank=2, alpha=4.0), checkpoint=checkpoint))
    assert other[0].step == 1
    assert next(iter(train(base, scene, small(), checkpoint=checkpoint))).step == 3


@pytest.mark.parametrize("content", [b"", b"half a check"])
def test_torn_checkpoint_does_not_stop_training(
    base: Base,
    scene: Scene,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    """It is named, and the run begins anew."""
    checkpoint = tmp_path / "run.checkpoint"
    interrupted(base, scene, small(), checkpoint, 6)
    (kept,) = checkpoints(tmp_path)
    kept.write_bytes(content)
    assert next(iter(train(base, scene, small(), checkpoint=checkpoint))).step == 1
    assert f"{kept} cannot be read" in caplog.text


def test_nothing_is_dropped_from_what_is_read_out(base: Base, scene: Scene) -> None:
    """The capsule's prompt is embedded by the whole text adapter, whatever is dropped in steps."""
    config = small(lora_drop_mode="element", lora_dropout=0.5, rate_text=1e-2, full_from=0.0)
    record = last_of(base, scene, config)
    assert record.capsule is not None
    capsule = read_capsule(record.capsule, base)
    plain = base.embed(capsule.header.prompt)
    for path, (a, b) in capsule.text_adapter.factors.items():
        weight = base.text_encoder.get_submodule(path).get_parameter("weight")
        weight.data += capsule.text_adapter.scale * b.float() @ a.float()
    whole = base.embed(capsule.header.prompt)
    moved = float((whole - plain).abs().max())
    assert float((whole - capsule.prompt_embedding.float()).abs().max()) < 0.02 * moved


def test_training_lowers_the_probe(base: Base, scene: Scene) -> None:
    """Sixty steps at a high rate fit the fixed probe better than none."""
    config = small(steps=60, probe_every=60, rate_unet=1e-2)
    readings = [r.probe for r in train(base, scene, config) if r.probe is not None]
    assert len(readings) == 2
    assert readings[-1] < readings[0]


def test_capsule_carries_what_serving_needs(base: Base, scene: Scene) -> None:
    """Factors for every target module, the prompt's embedding, references and the report."""
    capsule = read_capsule(last_of(base, scene, small()).capsule or b"", base)
    assert capsule.adapter.factors.keys() == target_layers(base.unet, base.adapter_modules).keys()
    assert all(a.dim() == b.dim() == 2 for a, b in capsule.adapter.factors.values())
    assert capsule.text_adapter.factors
    assert not torch.equal(capsule.prompt_embedding.float(), base.embed().half().float())
    assert capsule.extras["references.0"].dtype == torch.uint8
    assert capsule.header.training["samples"] == 24
    assert dict(capsule.header.digests) == scene.digests


def test_loss_that_is_not_finite_stops_the_run(base: Base, scene: Scene) -> None:
    """A rate far too high is named, with a remedy."""
    with pytest.raises(TrainingDiverged, match="rate_unet below"):
        last_of(base, scene, small(steps=40, rate_unet=1e30, clip_norm=1e30, probe_every=0))


def test_targets_hole_never_counts_and_never_shows(base: Base, scene: Scene) -> None:
    """What lies in the target's hole changes neither loss weights' cells nor the conditioning."""
    other = Scene(scene.name, scene.references, scene.target.clone(), scene.mask, None, {})
    other.target[:, scene.mask.bool()] = 0.9
    draws = [
        draw(base, Views(s, base.size_px, TrainingConfig()), 24, torch.Generator().manual_seed(3))
        for s in (scene, other)
    ]
    assert torch.equal(draws[0].masked, draws[1].masked)
    assert torch.equal(draws[0].masks, draws[1].masks)
    changed = (draws[0].latents != draws[1].latents).any(1).any(1).any(1)
    assert changed.any()
    # Every draw of the target masks its own hole, by more than that hole alone.
    assert bool((draws[0].masks[changed].sum((1, 2, 3)) > 0).all())
    assert bool((draws[0].weights[changed].sum((1, 2, 3)) < 16).all())


def test_references_count_everywhere(base: Base, scene: Scene) -> None:
    """Where nothing is missing from a picture, all of its cells weigh one."""
    draws = encode(
        base, torch.rand(2, 3, 32, 32), torch.ones(2, 1, 32, 32), torch.ones(2, 1, 32, 32)
    )
    assert bool((draws.weights == 1).all())
    assert torch.allclose(draws.masked, blank(base).expand_as(draws.masked), atol=1e-5)


@given(st.integers(0, 2**31), st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_error_is_normalised_by_its_weights(seed: int, gain: float) -> None:
    """A half-unknown sample weighs as much as a whole one; an unknown one adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn(3, 2, 4, 4, generator=generator)
    target = predicted + gain
    weights = torch.ones(3, 1, 4, 4)
    weights[1, :, :2] = 0
    weights[2] = 0
    assert weighted_error(predicted, target, weights).item() == pytest.approx(gain**2, rel=1e-4)


def test_target_follows_the_schedulers_prediction_type() -> None:
    """eps for eps-prediction, velocity for v-prediction."""
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    timesteps = torch.tensor([10, 900])
    eps, velocity = (
        tiny_base(prediction_type=kind).scheduler for kind in ("epsilon", "v_prediction")
    )
    assert torch.equal(target_of(eps, latents, noise, timesteps), noise)
    expected = velocity.get_velocity(latents, noise, timesteps)
    assert torch.equal(target_of(velocity, latents, noise, timesteps), expected)


def test_layers_are_dropped_one_by_one(base: Base) -> None:
    """In layer mode some branches are off and some on; in mode all they agree."""
    for mode, kinds in (("layer", 2), ("all", 1)):
        config = small(lora_dropout=0.5, lora_drop_mode=mode)
        with factors_in(base.unet, base.adapter_modules, config) as layers:
            drop(layers, config, torch.Generator().manual_seed(0))
            assert len({layer.disable_adapters for layer in layers}) == kinds


@pytest.mark.parametrize("mode", ["layer", "all"])
def test_dropped_layers_cost_nothing_and_change_nothing(
    base: Base, scene: Scene, monkeypatch: pytest.MonkeyPatch, mode: LoraDropout
) -> None:
    """The factors are those of branches that are computed and then multiplied by 0.

    To rounding: gradients of what several layers read are summed in another order.
    """

    def scale_by_zero(
        layers: list[LoraLayer], config: TrainingConfig, generator: torch.Generator
    ) -> None:
        count = len(layers) if config.lora_drop_mode == "layer" else 1
        kept = torch.rand(count, generator=generator) >= config.lora_dropout
        for index, layer in enumerate(layers):
            layer.scaling["scene"] = config.scale * float(kept[index % count])

    config = small(lora_dropout=0.5, lora_drop_mode=mode, rate_text=0.0)
    skipped = factors_of(base, last_of(base, scene, config))
    monkeypatch.setattr("realfill.adapt.training.drop", scale_by_zero)
    computed = factors_of(base, last_of(base, scene, config))
    assert torch.allclose(skipped, computed, rtol=0, atol=1e-5)
    assert computed.abs().max() > 0.1


def test_fresh_factors_change_nothing(base: Base) -> None:
    """lora_B starts at zero: the first prediction is the base's, and factors come in pairs."""
    latents, prompt = torch.randn(1, 9, 4, 4), base.embed()[None]
    plain = base.unet(latents, torch.tensor([5]), prompt).sample
    with factors_in(base.unet, base.adapter_modules, small()) as layers:
        assert len(parameters_of(layers)) == 2 * len(layers)
        adapted = base.unet(latents, torch.tensor([5]), prompt).sample
    assert torch.allclose(plain, adapted, atol=1e-6)


def test_probe_reads_the_same_twice(base: Base, scene: Scene) -> None:
    """Nothing random is left in a reading."""
    probe = new_probe(base, scene, 0, zoom=1.125)
    assert reading(base, probe, base.embed()) == reading(base, probe, base.embed())


def test_timestep_power_prefers_noise() -> None:
    """Power 1 is uniform; power 2 has mean two thirds; both stay within the schedule."""
    scheduler = tiny_base().scheduler
    uniform, noisier = (
        timesteps_of(torch.Generator().manual_seed(0), 20_000, scheduler, power)
        for power in (1.0, 2.0)
    )
    assert uniform.float().mean().item() == pytest.approx(500, abs=10)
    assert noisier.float().mean().item() == pytest.approx(667, abs=10)
    assert int(noisier.max()) <= 999


def test_known_cells_weigh_what_the_configuration_says(base: Base, scene: Scene) -> None:
    """At the paper's weight of 1 nothing changes; a lower one moves the loss towards the hole."""
    losses = [
        last_of(base, scene, small(steps=1, probe_every=0, known_weight=weight)).loss
        for weight in (1.0, 0.999, 0.05)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert abs(losses[2] - losses[0]) > 2 * abs(losses[1] - losses[0])
    with pytest.raises(ValueError, match="known_weight"):
        small(known_weight=0.0)


def test_adapter_is_weaker_where_little_is_known(base: Base, scene: Scene) -> None:
    """The scale says how far; the factors are the same."""
    bold, cautious = (
        read_capsule(capsule, base)
        for capsule in (
            last_of(base, scene, small(probe_every=0, full_from=share)).capsule
            for share in (0.5, 1.0)
        )
        if capsule is not None
    )
    missing = crop_mask(scene.mask, window_of(scene.mask, base.size_px), base.size_px).mean()
    assert bold.header.scale == 2.0
    assert bold.header.training["strength"] == 1
    assert cautious.header.scale == pytest.approx(2 * (1 - float(missing)) ** 2, abs=1e-3)
    assert cautious.header.alpha == pytest.approx(4 * cautious.header.scale)
    for path, factors in bold.adapter.factors.items():
        assert torch.equal(factors[0], cautious.adapter.factors[path][0])
        assert torch.equal(factors[1], cautious.adapter.factors[path][1])
    # The prompt goes through the text encoder at that strength too.
    assert not torch.equal(bold.prompt_embedding, cautious.prompt_embedding)
