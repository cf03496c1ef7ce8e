"""From a reference to a version, also while the registry is slow or away."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, field

from registry import Registry, StorageUnavailable, Version

log = logging.getLogger("service.resolver")

# References that are remembered; older ones are asked for again.
REMEMBERED = 10_000
# Calls that may wait for the registry at once.
CALLS = 16


@dataclass(frozen=True)
class Question:
    """What the registry says of one reference, or will say; asked for, or begun, ``since`` then."""

    since: float
    answer: Future[Version] = field(default_factory=Future)


class Resolver:
    """Asks the registry every time, so that a moved alias counts at once, but not for ever.

    Requests share questions, but nobody takes the answer to one that was begun before he came: it
    may have been read before an alias moved. Whoever comes while a question is under way waits,
    with all others who do, for the next.

    Where the registry does not answer in time, the last known version of that reference is used and
    said to be stale; the answer that comes late is remembered for the next request.

    Args:
        registry: To ask.
        patience_s: How long to wait for it.

    Attributes:
        stale: How often a remembered version was used.
    """

    def __init__(self, registry: Registry, *, patience_s: float) -> None:
        self.stale = 0
        self._registry = registry
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(CALLS, thread_name_prefix="realfill-resolve")
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Version] = OrderedDict()
        self._begun: dict[str, Question] = {}
        self._next: dict[str, Question] = {}
        self._answers = True

    def resolve(self, reference: str) -> tuple[Version, bool]:
        """The version that a reference means, and whether that is only what it meant last.

        Raises:
            StorageUnavailable: The registry does not answer, and the reference is not remembered.
            RegistryError: The registry says that there is no such version.
        """
        now = time.monotonic()
        with self._lock:
            known = self._known.get(reference)
            begun = self._begun.get(reference)
            if begun is None:
                question = begun = self._begin(reference, Question(now))
            else:
                question = self._next.setdefault(reference, Question(now))
        # Who finds a question under way waits only as long as that may still take. What nobody
        # knows yet is worth waiting for anew.
        left_s = self._patience_s if known is None else begun.since + self._patience_s - now
        try:
            version = question.answer.result(max(left_s, 0.0))
        except (OutOfTime, StorageUnavailable) as error:
            self._warn(error)
            if known is not None:
                self.stale += 1
                return known, True
            if isinstance(error, StorageUnavailable):
                raise
            raise StorageUnavailable(
                f"The registry did not say within {self._patience_s:g} s what {reference!r} is: "
                "try again, or raise REALFILL_REGISTRY_PATIENCE_S."
            ) from error
        self._answers = True
        return version, False

    def _begin(self, reference: str, question: Question) -> Question:
        """Ask in a thread of the pool; the lock is held."""
        self._begun[reference] = question
        self._pool.submit(self._ask, reference, question.answer)
        return question

    def _ask(self, reference: str, answer: Future[Version]) -> None:
        """Ask the registry, and remember what it says for when it does not; then the next."""
        try:
            version = self._registry.resolve(reference)
        except StorageUnavailable as error:
            answer.set_exception(error)
        except BaseException as error:  # noqa: BLE001  # whoever asked gets it
            # It says that the reference means nothing any more.
            with self._lock:
                self._known.pop(reference, None)
            answer.set_exception(error)
        else:
            with self._lock:
                self._known[reference] = version
                self._known.move_to_end(reference)
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            answer.set_result(version)
        with self._lock:
            del self._begun[reference]
            waiting = self._next.pop(reference, None)
            if waiting is not None:
                self._begin(reference, Question(time.monotonic(), waiting.answer))

    def _warn(self, error: BaseException) -> None:
        """Once, until the registry answers again."""
        if self._answers:
            log.warning("The registry does not answer; what was served goes on: %s", error)
        self._answers = False
