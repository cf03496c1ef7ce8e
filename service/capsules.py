"""Capsules in host memory: each is fetched once, however many ask, and kept within a budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from realfill.capsule import Capsule
from realfill.rank import ReferenceFeatures
from registry import Version
from service.engine.arena import Tier, TierMetrics
from service.leases import Leases


@dataclass(frozen=True)
class Loaded:
    """A capsule in memory, with its references as the matcher sees them (None: nothing to rank)."""

    capsule: Capsule
    references: ReferenceFeatures | None


class Capsules:
    """The host's tier of adapters; safe to use from many threads.

    A slow fetch of one scene holds up only those who ask for that scene.

    Args:
        load: Fetches, verifies and reads the capsule of a version.
        leases: Claims on what is in memory.
        budget_bytes: For the capsules, as large as their files.
    """

    def __init__(
        self, load: Callable[[Version], Loaded], leases: Leases, *, budget_bytes: int
    ) -> None:
        self._load = load
        self._leases = leases
        self._tier: Tier[Loaded] = Tier(budget_bytes)
        self._lock = threading.Lock()
        self._coming: dict[str, Future[Loaded]] = {}

    @property
    def digests(self) -> list[str]:
        """What is in memory, the least recently used first."""
        return self._tier.digests()

    def get(self, version: Version) -> Loaded:
        """The capsule of a version; errors as those of ``load``, and LeaseLost."""
        with self._lock:
            coming = self._coming.get(version.digest)
            if coming is None:
                loaded = self._use(version)
                if loaded is not None:
                    return loaded
                mine: Future[Loaded] = Future()
                self._coming[version.digest] = mine
        if coming is not None:
            return coming.result()
        try:
            loaded = self._bring(version)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(loaded)
            return loaded
        finally:
            with self._lock:
                del self._coming[version.digest]
            # Where it is not kept, for want of room or because of the error.
            self._give_up(version.digest)

    def drop(self, digest: str) -> bool:
        """Let go of a capsule and of the claim on it; False where it was not there."""
        with self._lock:
            here = digest in self._tier
            self._tier.drop(digest)
        self._give_up(digest)
        return here

    def metrics(self) -> TierMetrics:
        """The tier's contents and history."""
        return self._tier.metrics()

    def _use(self, version: Version) -> Loaded | None:
        """What is in memory already, which becomes the most recently used."""
        loaded = self._tier.find(version.digest)
        if loaded is not None:
            self._leases.note(version.digest)
        return loaded

    def _bring(self, version: Version) -> Loaded:
        loaded = self._load(version)
        self._leases.take(version.digest)
        self._tier.take(version.digest, version.size_bytes, lambda: loaded, pin=False)
        # Of what it pushed out, or others did meanwhile.
        for digest in sorted(self._leases.held):
            self._give_up(digest)
        return loaded

    def _give_up(self, digest: str) -> None:
        """The claim on a capsule, unless it is in memory or on its way there again."""
        # Looked at first: to give up a claim waits for the registry.
        if digest in self._leases.held and not self._is_of_use(digest):
            self._leases.give_up(digest, unless=partial(self._is_of_use, digest))

    def _is_of_use(self, digest: str) -> bool:
        with self._lock:
            return digest in self._coming or digest in self._tier
