"""From a reference to a version, also while the registry is slow or away."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime

from registry import Registry, StorageUnavailable, Version

log = logging.getLogger("service.resolver")

# References that are remembered; older ones are asked for again.
REMEMBERED = 10_000
# Calls that may wait for the registry at once.
CALLS = 16


class Resolver:
    """Asks the registry every time, so that a moved alias counts at once, but not for ever.

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
        self._asked: dict[str, tuple[Future[Version], float]] = {}
        self._answers = True

    def resolve(self, reference: str) -> tuple[Version, bool]:
        """The version that a reference means, and whether that is only what it meant last.

        Raises:
            StorageUnavailable: The registry does not answer, and the reference is not remembered.
            RegistryError: The registry says that there is no such version.
        """
        with self._lock:
            known = self._known.get(reference)
            if reference not in self._asked:
                asked = self._pool.submit(self._ask, reference)
                self._asked[reference] = asked, time.monotonic()
            asked, since = self._asked[reference]
        # Who joins a question that was asked before waits only as long as it may still take. What
        # nobody knows yet is worth waiting for anew.
        left_s = self._patience_s if known is None else since + self._patience_s - time.monotonic()
        try:
            version = asked.result(max(left_s, 0.0))
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

    def _ask(self, reference: str) -> Version:
        """Ask the registry, and remember what it says for when it does not."""
        try:
            version = self._registry.resolve(reference)
        except StorageUnavailable:
            raise
        except Exception:
            # It says that the reference means nothing any more.
            with self._lock:
                self._known.pop(reference, None)
            raise
        else:
            with self._lock:
                self._known[reference] = version
                self._known.move_to_end(reference)
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            return version
        finally:
            with self._lock:
                del self._asked[reference]

    def _warn(self, error: BaseException) -> None:
        """Once, until the registry answers again."""
        if self._answers:
            log.warning("The registry does not answer; what was served goes on: %s", error)
        self._answers = False
