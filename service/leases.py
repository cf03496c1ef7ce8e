"""Claims in the registry on the capsules in memory, so that nobody removes what is being served.

While this process holds a capsule loaded, its version is neither retired nor swept, and whoever
tries is told the holder's name. Claims expire unless they are renewed, so that a process that died
holds nothing for long. Serving comes first: a registry that cannot be written is only warned of.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from registry import LeaseLost, NotFound, Registry, RegistryError, StorageUnavailable

log = logging.getLogger("service.leases")


class Leases:
    """The claims of one process.

    A capsule that no alias points to any more and that nobody asked for between two renewals is
    let go, so that a version that was replaced can be retired after a while.

    Args:
        registry: Where the claims are.
        let_go: Called by the renewing thread with a digest whose capsule has to leave memory,
            because its claim was lost or it is of no use any more; calls ``give_up`` in turn.
        lease_s: After so many seconds a claim expires; a third of it is the time between renewals.

    Attributes:
        holder: The name of this process in the registry: host, process and a few random digits,
            because processes in containers share numbers.
    """

    def __init__(
        self, registry: Registry, let_go: Callable[[str], object], *, lease_s: float
    ) -> None:
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
        self._registry = registry
        self._let_go = let_go
        self._lasting = timedelta(seconds=lease_s)
        self._held: set[str] = set()
        self._asked: set[str] = set()
        # Held for whole transactions, so that no renewal takes again what is being given up.
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._writable = True

    def start(self) -> None:
        """Begin to renew; where that has begun, do nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="realfill-leases", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the renewals and give up every claim; from now on none is taken."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._held:
                self._write(lambda: self._registry.release(self.holder))
            self._held.clear()

    def take(self, digest: str) -> None:
        """Claim a capsule, in one transaction.

        Raises:
            LeaseLost: A sweep or an erasure took its bytes.
        """
        with self._lock:
            if not self._ended.is_set():
                self._write(lambda: self._hold({digest}))
                # Also where the registry cannot be written now: the next renewal tries again.
                self._held.add(digest)
                self._asked.add(digest)

    def note(self, digest: str) -> None:
        """Remember that somebody asked for a capsule; waits for nothing."""
        self._asked.add(digest)

    @property
    def held(self) -> set[str]:
        """Digests that are claimed now; waits for nothing."""
        return set(self._held)

    def give_up(self, digest: str, unless: Callable[[], bool]) -> None:
        """Give up the claim on a capsule; without one, do nothing.

        Args:
            digest: Of the capsule.
            unless: Whether it is of use again, asked when no other claim can be made meanwhile.
        """
        with self._lock:
            if digest in self._held and not unless():
                self._held.remove(digest)
                self._write(lambda: self._registry.release(self.holder, [digest]))

    def renew(self) -> None:
        """Renew every claim, and let the capsules go whose claim is lost or that are of no use."""
        with self._lock:
            lost = self._renew_all()
            self._held -= lost
            asked, self._asked = self._asked, set()
            idle = self._held - asked
        for digest in sorted(lost | {digest for digest in idle if self._is_replaced(digest)}):
            self._let_go(digest)

    def _run(self) -> None:
        while not self._ended.wait(self._lasting.total_seconds() / 3):
            self.renew()

    def _renew_all(self) -> set[str]:
        """The digests whose claims are lost."""
        if not self._held:
            return set()
        try:
            self._write(lambda: self._hold(self._held))
        except LeaseLost:
            # All or none are renewed at once: one after the other shows which are lost.
            return {digest for digest in self._held if self._is_lost(digest)}
        return set()

    def _is_lost(self, digest: str) -> bool:
        try:
            self._write(lambda: self._hold({digest}))
        except LeaseLost:
            return True
        return False

    def _is_replaced(self, digest: str) -> bool:
        """Whether no alias points to these bytes; False where the registry does not say."""
        try:
            return not self._registry.resolve(f"sha256:{digest}").aliases
        except NotFound:
            return True
        except RegistryError:
            return False

    def _hold(self, digests: set[str]) -> None:
        self._registry.hold(digests, self.holder, lasting=self._lasting)

    def _write(self, change: Callable[[], object]) -> None:
        """Make a change; a registry that cannot be written is warned of once, until it can be."""
        try:
            change()
        except StorageUnavailable as error:
            if self._writable:
                log.warning("Claims on what is served cannot be kept; serving goes on: %s", error)
            self._writable = False
        else:
            self._writable = True
