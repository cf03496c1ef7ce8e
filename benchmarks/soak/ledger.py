"""Which version each alias may have pointed to, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class _Stay:
    """A version at which an alias may have been, from one moment to another."""

    number: int
    from_s: float
    until_s: float = math.inf


class AliasLedger:
    """Where every scene's alias was; it begins at the latest version.

    A move takes effect at an unknown moment between its beginning and its end, so in between both
    versions are right.

    Args:
        digests: Of each scene's versions, from version 1 on.
    """

    def __init__(self, digests: Mapping[str, Sequence[str]]) -> None:
        self._digests = digests
        self._stays = {
            scene: [_Stay(len(versions), -math.inf)] for scene, versions in digests.items()
        }

    def after(self, scene: str, turn: int) -> int:
        """The number of the version ``turn`` places further than the alias, in a circle."""
        number = self._stays[scene][-1].number
        return (number - 1 + turn) % len(self._digests[scene]) + 1

    def begin_move(self, scene: str, number: int, at_s: float) -> None:
        """From now on the alias may point to this version."""
        self._stays[scene].append(_Stay(number, at_s))

    def end_move(self, scene: str, at_s: float) -> None:
        """From now on the alias points to no earlier version than the one it moved to."""
        for stay in self._stays[scene][:-1]:
            stay.until_s = min(stay.until_s, at_s)

    def allowed(self, scene: str, began_s: float, ended_s: float) -> frozenset[str]:
        """Digests that the alias may have pointed to at some moment of a span."""
        return frozenset(
            self._digests[scene][stay.number - 1]
            for stay in self._stays[scene]
            if stay.from_s <= ended_s and stay.until_s >= began_s
        )
