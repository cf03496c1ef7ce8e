"""Points in what a device was given to do: whether it has come to one, and when."""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Moment(Protocol):
    """The end of everything that the lane's thread gave the device before."""

    def passed(self) -> bool:
        """Whether the device has come to it."""
        ...

    def wait(self) -> None:
        """Return when it has; a failure of the device's work before it is raised here."""
        ...

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment of the same device; both have passed."""
        ...


class HostMoment:
    """Of a CPU, which has done what it was given when the call returns."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def passed(self) -> bool:
        """Always."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""

    def since(self, earlier: Moment) -> float:
        """Seconds of the clock."""
        assert isinstance(earlier, HostMoment)
        return self._at - earlier._at


class CudaMoment:
    """In the stream that the thread gives its work to."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        """Without waiting."""
        return self._event.query()

    def wait(self) -> None:
        """Until the stream has come to it, and no further."""
        self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds by the device's clock, in which it waited for nothing but its own work."""
        assert isinstance(earlier, CudaMoment)
        return earlier._event.elapsed_time(self._event) / 1000
