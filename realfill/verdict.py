"""What the gate says of a filling; apart, so that a client reads answers without torch."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["supported", "weak", "unsupported"]
