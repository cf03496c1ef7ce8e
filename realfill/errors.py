"""Everything that realfill raises on purpose.

RealFillError
├── InvalidScene        photographs or masks that cannot be used
├── InvalidCapsule      a capsule that is torn, tampered with or malformed
├── AdapterMismatch     a sound capsule that was trained for another base
├── BaseUnavailable     a base that is missing or incomplete
├── MatcherUnavailable  a matcher whose weights cannot be had
└── TrainingDiverged    training whose loss is no longer finite
"""

from __future__ import annotations


class RealFillError(Exception):
    """Base of the tree; the message names the thing, the value and the remedy."""

    code = "realfill_error"


class InvalidScene(RealFillError):
    """The photographs or the mask cannot be used as they are."""

    code = "invalid_scene"


class InvalidCapsule(RealFillError):
    """The bytes are not a sound capsule."""

    code = "invalid_capsule"


class AdapterMismatch(RealFillError):
    """The capsule is sound, but was trained for another base."""

    code = "adapter_mismatch"


class BaseUnavailable(RealFillError):
    """The base model is missing, incomplete or not an inpainting model."""

    code = "base_unavailable"


class MatcherUnavailable(RealFillError):
    """The matcher's weights are missing, incomplete or of another architecture."""

    code = "matcher_unavailable"


class TrainingDiverged(RealFillError):
    """The training loss is no longer finite."""

    code = "training_diverged"
