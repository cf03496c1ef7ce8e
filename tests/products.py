"""What exact layers may multiply in on this machine."""

from __future__ import annotations

import pytest
import torch

MULTIPLIES_BFLOAT16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
PRODUCTS = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not MULTIPLIES_BFLOAT16, reason="this CPU does not multiply in bfloat16"
        ),
    ),
]
