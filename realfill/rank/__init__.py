"""Ranking: which candidate do the references vouch for, and by which correspondences."""

from realfill.rank.correspondences import Correspondences, Features, Matcher, Matches
from realfill.rank.evidence import draw_correspondences
from realfill.rank.matchers import load_matcher
from realfill.rank.matching import loftr
from realfill.rank.ranking import Ranking, rank_candidates
from realfill.rank.references import ReferenceFeatures, from_extras, prepare_references, to_extras

__all__ = [
    "Correspondences",
    "Features",
    "Matcher",
    "Matches",
    "Ranking",
    "ReferenceFeatures",
    "draw_correspondences",
    "from_extras",
    "load_matcher",
    "loftr",
    "prepare_references",
    "rank_candidates",
    "to_extras",
]
