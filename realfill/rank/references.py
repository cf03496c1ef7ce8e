"""References as a matcher sees them: made once, kept with the scene, used by every ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from realfill.capsule import Capsule
from realfill.rank.correspondences import Features, Matcher

# Luma weights of sRGB, those that LoFTR was trained with.
LUMA = (0.299, 0.587, 0.114)
# Digits of the matcher's digest in the names of kept features: beyond accident, and short.
DIGEST_DIGITS = 16


@dataclass(frozen=True)
class ReferenceFeatures:
    """References as a matcher sees them, kept from one ranking to the next.

    Attributes:
        features: One entry of a single image per reference.
        sizes: Height and width of each photo, in px.
    """

    features: tuple[Features, ...]
    sizes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.features)


@torch.no_grad()
def prepare_references(matcher: Matcher, references: Sequence[Tensor]) -> ReferenceFeatures:
    """Let the matcher look at each reference once, so that many rankings can share it.

    Args:
        matcher: Finds the correspondences.
        references: Photos in [0, 1], of any size. [3, H, W] or [1, H, W] each

    Returns:
        What ``rank_candidates`` takes in place of the photos.
    """
    sizes = [(int(photo.shape[-2]), int(photo.shape[-1])) for photo in references]
    features = [matcher.features(at_working_size(matcher, photo[None])) for photo in references]
    return ReferenceFeatures(tuple(features), tuple(sizes))


def at_working_size(matcher: Matcher, images: Tensor) -> Tensor:
    """Grey images at the matcher's long side, sides rounded to its multiple. [N, 1, h, w]"""
    height, width = images.shape[-2:]
    scale = matcher.working_px / max(height, width)
    multiple = matcher.size_multiple
    size = [max(1, round(side * scale / multiple)) * multiple for side in (height, width)]
    grey = images.float()
    if images.shape[1] == 3:
        # By numbers, not by a tensor of them, whose copy a GPU would have to be waited for.
        red, green, blue = (luma * grey[:, k : k + 1] for k, luma in enumerate(LUMA))
        grey = red + green + blue
    if size == [height, width]:
        return grey
    grey = F.interpolate(grey, size=size, mode="bilinear", align_corners=False, antialias=True)
    return grey.clamp(0, 1)


def to_extras(matcher: Matcher, references: ReferenceFeatures) -> dict[str, Tensor]:
    """What a capsule keeps of its references beside their pictures.

    The names carry the first digits of the matcher's digest, so that features of one matcher are
    never taken for those of another. A reference of 256 px costs 0.26 MB with nano, one of 512 px
    4.2 MB with the full LoFTR.

    Returns:
        Entries for ``Capsule.extras``, named ``reference_features.<digest>.<k>.tokens``,
        ``.frame`` (grid and size of the photo) and, where the matcher finds its own, ``.points``.
    """
    extras = {}
    features = zip(references.features, references.sizes, strict=True)
    for k, (seen, size) in enumerate(features):
        prefix = f"{_prefix(matcher)}.{k}"
        extras[f"{prefix}.tokens"] = seen.tokens[0].float().cpu()
        extras[f"{prefix}.frame"] = torch.tensor([*seen.grid, *size], dtype=torch.float32)
        if seen.points is not None:
            extras[f"{prefix}.points"] = seen.points[0].float().cpu()
    return extras


def with_features(capsule: Capsule, matcher: Matcher) -> Capsule:
    """The capsule with what a matcher sees of its own reference pictures kept beside them."""
    names = sorted(name for name in capsule.extras if name.startswith("references."))
    photos = [capsule.extras[name].float() / 255 for name in names]
    kept = to_extras(matcher, prepare_references(matcher, photos))
    return replace(capsule, extras={**capsule.extras, **kept})


def from_extras(matcher: Matcher, extras: Mapping[str, Tensor]) -> ReferenceFeatures | None:
    """The references as ``to_extras`` kept them, or None where this matcher made none.

    Features that do not hang together count as absent: the references are then looked at again.
    """
    features: list[Features] = []
    sizes: list[tuple[int, int]] = []
    while f"{_prefix(matcher)}.{len(features)}.tokens" in extras:
        prefix = f"{_prefix(matcher)}.{len(features)}"
        tokens, points = extras[f"{prefix}.tokens"], extras.get(f"{prefix}.points")
        frame = extras.get(f"{prefix}.frame", torch.zeros(0)).tolist()
        if len(frame) != 4 or tokens.dim() != 2 or min(frame) < 1:
            return None
        rows, columns, height, width = (int(side) for side in frame)
        # A matcher that pads its images keeps more tokens than cells.
        if len(tokens) < rows * columns if points is None else len(tokens) != len(points):
            return None
        own = None if points is None else points[None]
        features.append(Features(tokens[None], (rows, columns), own))
        sizes.append((height, width))
    return ReferenceFeatures(tuple(features), tuple(sizes)) if features else None


def _prefix(matcher: Matcher) -> str:
    return f"reference_features.{matcher.digest[:DIGEST_DIGITS]}"
