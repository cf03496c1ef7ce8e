"""Which numbers are computed with where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from realfill import precision
from realfill.precision import serving_precision, training_dtype

FULL, HALF, SHORT = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("quick", [True, False])
def test_by_itself_a_cpu_multiplies_in_bfloat16_where_it_does_so_quickly(
    monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    """Its weights are float32 either way."""
    _pretend(monkeypatch, quick)
    expected = SHORT if quick else FULL
    assert training_dtype("cpu") == expected
    assert serving_precision("cpu") == (FULL, expected)


def test_on_a_gpu_everything_is_in_one_precision() -> None:
    """bfloat16 by itself."""
    assert serving_precision("cuda:1") == (SHORT, SHORT)
    assert serving_precision("cuda", "float32") == (FULL, FULL)
    assert training_dtype("cuda") == SHORT


def test_what_is_wanted_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is slow."""
    _pretend(monkeypatch, True)
    assert serving_precision("cpu", "float32") == (FULL, FULL)
    assert serving_precision("cpu", "float16") == (HALF, HALF)
    assert serving_precision("cpu", "bfloat16") == (FULL, SHORT)


def test_a_cpu_that_does_not_multiply_in_bfloat16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than fail in its first step."""
    _pretend(monkeypatch, False)
    with pytest.raises(ValueError, match="use float32 or auto"):
        serving_precision("cpu", "bfloat16")


def _pretend(monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: quick)
    ops = SimpleNamespace(mkldnn=SimpleNamespace(_is_mkldnn_bf16_supported=lambda: quick))
    monkeypatch.setattr(
        precision, "torch", SimpleNamespace(**{**vars(torch), "ops": ops, "cpu": torch.cpu})
    )
