"""What of many scenes lies ready: the least recently used goes, what a job needs stays."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")


@dataclass(frozen=True)
class TierMetrics:
    """One tier's contents and history.

    Attributes:
        budget_bytes: What it may hold.
        held_bytes: What it holds.
        entries: Scenes in it.
        pinned: Of those, scenes that jobs need now.
        hits, misses: Scenes that were found in it or not when a job asked.
        evictions: Scenes that left to make room.
    """

    budget_bytes: int
    held_bytes: int
    entries: int
    pinned: int
    hits: int
    misses: int
    evictions: int


@dataclass(eq=False)
class _Entry(Generic[V]):
    value: V
    size_bytes: int
    pins: int = 0


class Tier(Generic[V]):
    """Values by digest within a budget of bytes; safe to use from many threads.

    A single entry may exceed the budget where nothing else is in the tier: a scene that is asked
    for is served, however small the budget.

    Args:
        budget_bytes: What the entries may take together.
        on_evict: Told each value that leaves, while the tier is locked.
    """

    def __init__(self, budget_bytes: int, on_evict: Callable[[V], None] | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._on_evict = on_evict
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()
        self._making: dict[str, threading.Event] = {}
        # Pins of what was expelled: whoever has them still gives them back.
        self._orphaned: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._held_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._entries

    def __getitem__(self, digest: str) -> V:
        """What lies there; KeyError where nothing does. Counts as no use."""
        with self._lock:
            return self._entries[digest].value

    def find(self, digest: str) -> V | None:
        """What lies there, which becomes the most recently used; None where nothing does."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return None
            self._hits += 1
            return self._use(digest, entry, pin=False)

    def digests(self) -> list[str]:
        """What is there, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def take(
        self,
        digest: str,
        size_bytes: int,
        make: Callable[[], V],
        *,
        pin: bool = True,
        wait: bool = True,
        spare: Collection[str] = (),
    ) -> V | None:
        """Find a value or make it, and keep it there until it is given back.

        Nothing is made twice, and the tier stays open to others while a value is made.

        Args:
            digest: Its name.
            size_bytes: What it takes.
            make: Makes it, once there is room for it.
            pin: Whether it must stay until ``give_back``; otherwise it is brought for later.
            wait: Whether to wait for a value that another thread is making.
            spare: What must not leave to make room for it, besides what is pinned.

        Returns:
            The value; None where everything that could make room is pinned or spared, or where it
            is being made and nobody wants to wait.
        """
        while True:
            with self._lock:
                entry = self._entries.get(digest)
                if entry is not None:
                    return self._use(digest, entry, pin=pin)
                made = self._making.get(digest)
                if made is None:
                    if not self._make_room(size_bytes, spare):
                        return None
                    self._making[digest] = threading.Event()
                    self._held_bytes += size_bytes
                    break
            if not wait:
                return None
            made.wait()
        return self._made(digest, size_bytes, make, pin=pin)

    def _use(self, digest: str, entry: _Entry[V], *, pin: bool) -> V:
        """Something that is there; the lock is held."""
        self._hits += int(pin)
        entry.pins += int(pin)
        self._entries.move_to_end(digest)
        return entry.value

    def _made(self, digest: str, size_bytes: int, make: Callable[[], V], *, pin: bool) -> V:
        """Make what there is room for; without the lock."""
        entry: _Entry[V] | None = None
        try:
            entry = _Entry(make(), size_bytes, int(pin))
            return entry.value
        finally:
            with self._lock:
                if entry is None:
                    self._held_bytes -= size_bytes
                else:
                    self._entries[digest] = entry
                    self._misses += 1
                self._making.pop(digest).set()

    def give_back(self, digest: str) -> None:
        """Undo one pin."""
        with self._lock:
            if self._orphaned[digest]:
                # It was expelled meanwhile, and may have come back for others.
                self._orphaned -= Counter([digest])
                return
            entry = self._entries.get(digest)
            if entry is None:
                return
            if entry.pins < 1:
                raise ValueError(f"{digest} is not pinned; give back only what was taken")
            entry.pins -= 1
            self._make_room(0)

    def drop(self, digest: str) -> bool:
        """Take a value out unless a job needs it or it is being made; whether it is gone."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return digest not in self._making
            if entry.pins:
                return False
            self._remove(digest)
            return True

    def expel(self, digest: str) -> None:
        """Take a value out even if jobs need it: it must not be used again."""
        with self._lock:
            if digest in self._entries:
                self._orphaned[digest] += self._entries[digest].pins
                self._remove(digest)

    def clear(self) -> None:
        """Take everything out, pinned or not."""
        with self._lock:
            for digest in list(self._entries):
                self._remove(digest)

    def metrics(self) -> TierMetrics:
        """Contents and history."""
        with self._lock:
            return TierMetrics(
                budget_bytes=self.budget_bytes,
                held_bytes=self._held_bytes,
                entries=len(self._entries),
                pinned=sum(entry.pins > 0 for entry in self._entries.values()),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def _make_room(self, size_bytes: int, spare: Collection[str] = ()) -> bool:
        """Evict until so many bytes fit; False where what must stay leaves no room."""
        for digest in list(self._entries):
            if self._fits(size_bytes):
                break
            if not self._entries[digest].pins and digest not in spare:
                self._remove(digest)
                self._evictions += 1
        return self._fits(size_bytes) or not (self._entries or self._making)

    def _fits(self, size_bytes: int) -> bool:
        return self._held_bytes + size_bytes <= self.budget_bytes

    def _remove(self, digest: str) -> None:
        entry = self._entries.pop(digest)
        self._held_bytes -= entry.size_bytes
        if self._on_evict is not None:
            self._on_evict(entry.value)
