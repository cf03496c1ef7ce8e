"""Work of a device that is launched as one: CUDA graphs, and on a CPU the work itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Runs before a capture, in which libraries choose algorithms and allocate.
WARM_UPS = 3


class Captures:
    """Captures work on one device, all in one pool of memory.

    What is captured must read from and write to memory that stays where it is, and no two pieces of
    it may run at once.

    Attributes:
        count: Graphs captured so far; constant after the warm-up, and 0 on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._device = device
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            # One stream for warm-ups and captures: what libraries keep for a stream is kept once.
            self._aside = torch.cuda.Stream(device)
            # One pool: no two graphs run at once, and what they leave lies in the buffers.
            self._pool = torch.cuda.graph_pool_handle()

    def of(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work that is launched as one, or the work itself; the buffers are garbage afterwards."""
        if not self._on_cuda:
            return work
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._aside.wait_stream(current)
        try:
            with torch.cuda.stream(self._aside):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(self._aside)
            # Other threads bring adapters meanwhile: what they ask of the device is no part of it.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"
            ):
                work()
        finally:
            # A capture that cannot be ended leaves its stream as the thread's own, where nothing
            # waits for what other threads bring.
            torch.cuda.set_stream(current)
        self.count += 1
        replay: Callable[[], None] = graph.replay
        return replay

    def finish(self) -> None:
        """Wait until nothing that was captured runs any more, so that it can be given up."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)
