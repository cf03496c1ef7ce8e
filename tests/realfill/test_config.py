"""Training configurations."""

from __future__ import annotations

import dataclasses

import pytest

from realfill.config import PRESETS, TrainingConfig, preset


def test_paper_preset_is_the_papers() -> None:
    """Rank 8, 2000 iterations of 16, 2e-4 and 4e-5, every dropout 0.1, layers dropped."""
    paper = PRESETS["paper"]
    assert (paper.rank, paper.steps, paper.batch) == (8, 2000, 16)
    assert (paper.rate_unet, paper.rate_text) == (2e-4, 4e-5)
    assert (paper.prompt_dropout, paper.mask_dropout, paper.lora_dropout) == (0.1, 0.1, 0.1)
    assert paper.lora_drop_mode == "layer"
    assert paper.pool == 0


def test_digest_names_the_whole_configuration() -> None:
    """Any changed value changes the digest; equal configurations share it."""
    paper = PRESETS["paper"]
    assert paper.digest == TrainingConfig().digest
    assert paper.digest != dataclasses.replace(paper, seed=1).digest


def test_options_that_came_later_leave_older_digests_alone() -> None:
    """At what was implied before they do not count, at any other value they do."""
    demo = PRESETS["demo"]
    # As it was when the first adapters were trained by it.
    before = preset("demo", steps=220, probe_every=110)
    assert before.digest.startswith("29c85a11d5cd54e6")
    changed = {preset("demo", target_union=False).digest}
    changed |= {preset("demo", mask_reduction="nearest").digest, demo.digest}
    assert len(changed) == 3


def test_preset_takes_changes() -> None:
    """A change wins over the preset, the rest stays."""
    changed = preset("demo", steps=3)
    assert changed.steps == 3
    assert changed.rank == PRESETS["demo"].rank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rank": 129}, "rank is 129"),
        ({"mask_dropout": 1.0}, "mask_dropout is 1.0"),
        ({"rate_unet": 0.0}, "rate_unet is 0.0"),
        ({"lora_drop_mode": "some"}, "lora_drop_mode is 'some'"),
        ({"mask_reduction": "mean"}, "mask_reduction is 'mean'"),
        ({"steps": "many"}, "steps is 'many': it must be a whole number"),
        ({"batch": 2.5}, "batch is 2.5: it must be a whole number"),
        ({"clip_norm": float("inf")}, "clip_norm is inf: it must be a finite number"),
        ({"alpha": "16"}, "alpha is '16': it must be a finite number"),
        ({"decay_rate": 1}, "decay_rate is 1: it must be true or false"),
        ({"colour": 1}, "Unknown training option 'colour'"),
    ],
)
def test_bad_option_is_refused(changes: dict[str, object], message: str) -> None:
    """The sentence names the option, its value and the bound."""
    with pytest.raises(ValueError, match=message):
        preset("paper", **changes)


def test_unknown_preset_is_refused() -> None:
    """The sentence lists the presets."""
    with pytest.raises(ValueError, match="choose one of paper"):
        preset("best")
