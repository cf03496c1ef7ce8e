"""Ranking: which candidate do the references vouch for, and by which correspondences."""

from realfill.rank.consistency import consistent
from realfill.rank.correspondences import Correspondences, Features, Matcher, Matches
from realfill.rank.evidence import draw_correspondences
from realfill.rank.gate import Thresholds, calibrate, judge
from realfill.rank.matchers import load_matcher
from realfill.rank.matching import loftr
from realfill.rank.preflight import Caution, preflight
from realfill.rank.ranking import Ranking, rank_candidates
from realfill.rank.references import (
    ReferenceFeatures,
    from_extras,
    prepare_references,
    to_extras,
    with_features,
)
from realfill.verdict import Verdict

__all__ = [
    "Caution",
    "Correspondences",
    "Features",
    "Matcher",
    "Matches",
    "Ranking",
    "ReferenceFeatures",
    "Thresholds",
    "Verdict",
    "calibrate",
    "consistent",
    "draw_correspondences",
    "from_extras",
    "judge",
    "load_matcher",
    "loftr",
    "preflight",
    "prepare_references",
    "rank_candidates",
    "to_extras",
    "with_features",
]
