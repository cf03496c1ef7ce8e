"""Ranking: which candidate do the references vouch for, and by which correspondences."""

from realfill.rank.evidence import draw_correspondences
from realfill.rank.matching import (
    Correspondences,
    Features,
    Matcher,
    loftr,
)
from realfill.rank.ranking import (
    Ranking,
    ReferenceFeatures,
    prepare_references,
    rank_candidates,
)

__all__ = [
    "Correspondences",
    "Features",
    "Matcher",
    "Ranking",
    "ReferenceFeatures",
    "draw_correspondences",
    "loftr",
    "prepare_references",
    "rank_candidates",
]
