"""Which attention runs, and why xformers may not."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine import Runner
from service.engine import attention as attention_module
from service.engine.attention import (
    ATTEND,
    Attend,
    Attention,
    Chosen,
    attend_by_torch,
    attention_for,
    choose_attention,
    times_as_long,
    xformers_obstacle,
)
from service.engine.fusion import install_attention, largest_attention
from tests.service.engine.test_lane import job_for as lane_job
from tests.tiny import tiny_base

CPU = torch.device("cpu")
SHAPE = (2, 16, 2, 8)


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
    assert attention_for("auto", CPU, torch.float32, SHAPE) == "sdpa"


def test_a_much_slower_xformers_gives_way_and_the_log_says_by_how_much(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on Hopper, where torch takes cuDNN's kernels; a little slower, or asked for, it stays."""
    with caplog.at_level(logging.INFO):
        assert choose_attention("auto", "cuda", obstacle=None, slower=1.62) == "sdpa"
        assert choose_attention("auto", "cuda", obstacle=None, slower=1.05) == "xformers"
    assert "sdpa: xformers takes 1.62 times as long" in caplog.text
    assert "xformers: it takes 1.05 times as long" in caplog.text
    assert choose_attention("xformers", "cuda", obstacle=None, slower=1.62) == "xformers"


def slow(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention that takes its time."""
    time.sleep(0.002)
    return attend_by_torch(queries, keys, values)


def instant(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """No attention at all, which nothing beats."""
    return values


@pytest.mark.parametrize(("attend", "chosen"), [(slow, "sdpa"), (instant, "xformers")])
def test_auto_times_what_runs(
    attend: Attend, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tokens as the base has them."""
    monkeypatch.setattr(attention_module, "xformers_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(attention_module, "_xformers", lambda: attend)
    assert attention_for("auto", CPU, torch.float32, SHAPE) == chosen


def test_one_way_is_timed_by_the_other() -> None:
    """A way that sleeps takes several times as long as one that does not."""
    assert times_as_long(slow, attend_by_torch, torch.randn(SHAPE)) > 2


@torch.no_grad()
def test_a_network_attends_as_it_is_told() -> None:
    """All of its attention, whose outcome is what it was; released, to the bit."""
    base, seen = tiny_base(), []
    inputs = torch.randn(2, 9, 4, 4), torch.tensor([500, 20]), torch.randn(2, 77, 16)
    plain = base.unet(*inputs).sample

    def attends(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen.append(tuple(queries.shape))
        return attend_by_torch(queries, keys, values)

    installed = install_attention(base.unet, attends)
    torch.testing.assert_close(base.unet(*inputs).sample, plain, rtol=1e-4, atol=1e-4)
    installed.release()
    # Self and cross attention of four transformers; the first at a picture's full size.
    assert len(seen) == 8
    assert largest_attention(base.unet, 16) == (8, *seen[0][1:])
    assert torch.equal(base.unet(*inputs).sample, plain)


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


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["sdpa", "cudnn", "xformers"])
@pytest.mark.parametrize("tokens", [(4096, 4096), (1024, 77), (64, 77)])
def test_every_way_attends_alike(way: Chosen, dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    """Of tokens, and of prompts that lie as they are kept: as far from float32 as torch's own."""
    cuda = torch.device("cuda")
    if way == "xformers" and (obstacle := xformers_obstacle(cuda, dtype)) is not None:
        pytest.skip(f"xformers does not run: {obstacle}")
    heads, width = 5, 64
    queries = torch.randn(2, tokens[0], heads * width, device=cuda, dtype=dtype)
    both = torch.randn(2, 2, tokens[1], heads * width, device=cuda, dtype=dtype)
    by_head = [x.unflatten(-1, (heads, width)) for x in (queries, *both)]
    exactly = attend_by_torch(*(x.float() for x in by_head))
    attended = ATTEND[way](*by_head)
    assert attended.shape == exactly.shape
    # Weights of a softmax and what they add up to are rounded to the type, once each.
    bound = 2 * torch.finfo(dtype).eps * exactly.abs().max()
    assert (attended.float() - exactly).abs().max() <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["auto", "cudnn", "xformers"])
def test_a_runner_attends_as_it_is_told(way: Attention) -> None:
    """A captured step by any of them, and all give the same picture but for roundings."""
    base = tiny_base()
    for module in (base.unet, base.autoencoder):
        module.to("cuda", torch.bfloat16)
    if way == "xformers" and xformers_obstacle(base.device, base.dtype) is not None:
        with pytest.raises(ValueError, match="attention is 'xformers', but"):
            Runner(base, attention=way)
        return
    job = lane_job(base)
    images = []
    for setting in (way, "sdpa"):
        runner = Runner(base, attention=setting)
        images.append(runner.run(job).samples)
        runner.release()
    torch.testing.assert_close(*images, rtol=0, atol=0.1)
