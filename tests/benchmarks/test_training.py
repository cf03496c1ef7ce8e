"""The training benchmark on a tiny base: what is counted, and what the rows say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from benchmarks.record import read_rows
from benchmarks.training import costs, turns
from benchmarks.training.__main__ import main
from benchmarks.training.costs import Costs, count_costs
from realfill.config import TrainingConfig, preset
from realfill.nano.demo import motorcycle_scene
from realfill.scene import Scene
from tests.tiny import save_tiny_base, tiny_base


def test_a_run_is_the_sum_of_its_parts() -> None:
    """Ours by steps, batch and pool; the script's by pictures, with a validation each 100 steps."""
    parts = Costs(sample=1000, prompts=20, picture=300, forward=400, decode=50)
    assert parts.ours(steps=10, batch=4, pool=7) == 7 * 300 + 10 * (20 + 4 * 1000)
    training = 250 * 3 * (1000 + 300 + 10)
    assert parts.reference(steps=250, pictures=3) == training + 2 * 4 * (200 * 400 + 150 + 50)


def test_attention_is_counted() -> None:
    """Its two products, which a fused kernel hides from the counter on a CPU."""
    heads, tokens, width = 2, 16, 8
    x = torch.randn(1, heads, tokens, width, dtype=torch.bfloat16)
    counted = costs._counted(lambda: F.scaled_dot_product_attention(x, x, x))
    assert counted == 2 * (2 * heads * tokens * tokens * width)


def test_counts_follow_what_runs() -> None:
    """A sample costs its way there twice and more, and parts do not depend on each other."""
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    parts = count_costs(base, motorcycle_scene())
    assert 1.5 * parts.forward < parts.sample < 4 * parts.forward
    assert min(parts.prompts, parts.picture, parts.forward, parts.decode) > 0
    assert count_costs(base, motorcycle_scene()) == parts
    after = base.unet.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_runs_take_turns_stretch_by_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the first of every other turn, and both come to their end."""
    made: list[str] = []

    def train(base: str, scene: Scene, config: TrainingConfig) -> Iterator[None]:
        for _ in range(config.steps):
            made.append(base)
            yield

    monkeypatch.setattr(turns, "train", train)
    bases: Any = ["a", "b"]
    config = preset("demo", steps=25)
    told: list[None] = []
    seconds = turns.seconds_in_turns(
        bases, motorcycle_scene(), [config, config], lambda: told.append(None)
    )
    assert "".join(made) == 10 * "a" + 20 * "b" + 15 * "a" + 5 * "b"
    assert len(told) == 50
    assert min(seconds) > 0


def test_the_command_records_its_rows(tmp_path: Path) -> None:
    """Of a tiny base, whose training takes no time."""
    base = str(save_tiny_base(tmp_path / "base"))
    words = ["--base", base, "--counted", base, "--steps", "12", "--rows", str(tmp_path / "rows")]
    answer = CliRunner().invoke(main, words, catch_exceptions=False)
    assert answer.exit_code == 0
    rows = {row.name: row for row in read_rows(tmp_path / "rows")}
    assert rows["train.flops_ratio_reference"].target == 3
    assert rows["train.flops_ratio_reference"].value > 1
    assert rows["train.wall_ratio_unpooled"].ratio == rows["train.wall_ratio_unpooled"].value
    peer_s = rows["train.wall_s"].peer_value
    assert peer_s is not None
    assert peer_s / rows["train.wall_s"].value == rows["train.wall_ratio_unpooled"].value
    assert rows["train.run_pflop"].peer_value is not None
