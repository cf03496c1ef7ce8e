"""Which attention runs, and why xformers may not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine.attention import Attention, choose_attention, xformers_obstacle

CPU = torch.device("cpu")


def no_kernel(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What xformers says that was built for another torch."""
    raise NotImplementedError(
        "No operator found for `memory_efficient_attention_forward` with inputs:\n  query: ..."
    )


@pytest.mark.parametrize(
    ("setting", "device", "obstacle", "chosen"),
    [
        ("auto", "cuda", None, "xformers"),
        ("auto", "cuda", "it is not installed", "sdpa"),
        ("auto", "cpu", "the base is on cpu", "sdpa"),
        ("sdpa", "cuda", None, "sdpa"),
        ("xformers", "cuda", None, "xformers"),
        ("cudnn", "cuda", None, "cudnn"),
    ],
)
def test_attention_follows_setting_device_and_what_runs(
    setting: Attention, device: str, obstacle: str | None, chosen: str
) -> None:
    """xformers runs on CUDA where it can, unless another is asked for."""
    assert choose_attention(setting, device, obstacle=obstacle) == chosen


def test_an_xformers_without_kernels_gives_way_and_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wheel for another torch imports, and is still not chosen."""
    obstacle = xformers_obstacle(CPU, torch.float32, attend=no_kernel)
    assert obstacle is not None
    assert obstacle.startswith(f"it has no kernel for torch {torch.__version__} here (No operator")
    assert "\n" not in obstacle
    with caplog.at_level(logging.WARNING):
        assert choose_attention("auto", "cuda", obstacle=obstacle) == "sdpa"
    assert "No operator found" in caplog.text


def test_an_xformers_that_attends_has_no_obstacle() -> None:
    """It is run once, on what the base computes in."""
    seen = []

    def attends(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen.append((queries.dtype, queries.device.type))
        return values

    assert xformers_obstacle(CPU, torch.bfloat16, attend=attends) is None
    assert seen == [(torch.bfloat16, "cpu")]


def test_off_cuda_xformers_is_not_even_imported() -> None:
    """A CPU needs no package to know."""
    assert xformers_obstacle(CPU, torch.float32) == "the base is on cpu"


def test_xformers_that_cannot_run_is_refused_with_the_remedy() -> None:
    """Asking for xformers where it does not run says why, and what to install or set."""
    with pytest.raises(ValueError, match=r"not installed; pip install 'realfill-serve\[gpu\]'"):
        choose_attention("xformers", "cuda", obstacle="it is not installed")
    with pytest.raises(ValueError, match="the base is on cpu"):
        choose_attention("xformers", "cpu", obstacle="the base is on cpu")
    with pytest.raises(ValueError, match="'cudnn', but the base is on cpu"):
        choose_attention("cudnn", "cpu", obstacle=None)
    unknown: Any = "flash"
    with pytest.raises(ValueError, match="'flash'; use one of"):
        choose_attention(unknown, "cpu", obstacle=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_tells_whether_xformers_runs(dtype: torch.dtype) -> None:
    """Whatever is installed, the answer is a reason or none, and never an error."""
    obstacle = xformers_obstacle(torch.device("cuda"), dtype)
    assert obstacle is None or obstacle.startswith("it ")
