"""Who is in the next batch: urgent deadlines first, then tenants and scenes in fair shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Flow = tuple[str, str | None]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Ready:
    """Samples of one job that could make a step now.

    Attributes:
        key: The job.
        tenant: On whose behalf.
        scene: Digest of its adapter.
        count: How many samples.
        slack_s: Seconds between its expected end and its deadline; None without a deadline.
        needs_s: Seconds of steps that it still needs, being in every batch.
        work_s: Seconds of full batches that its samples make up.
    """

    key: Hashable
    tenant: str
    scene: str | None
    count: int
    slack_s: float | None = None
    needs_s: float = 0.0
    work_s: float = 0.0

    @property
    def due_s(self) -> float:
        """Seconds until it has to be through; without end where it has no deadline."""
        return math.inf if self.slack_s is None else self.slack_s + self.needs_s

    @property
    def urgent(self) -> bool:
        """Whether its deadline is missed unless it is in more than every second batch from now."""
        return self.slack_s is not None and self.slack_s < self.needs_s

    @property
    def hopeless(self) -> bool:
        """Whether its deadline is missed even if it is in every batch."""
        return self.slack_s is not None and self.slack_s < 0


class Batcher:
    """Deficit round robin over the places of each batch.

    Urgent jobs go first, those with the least time to spare before the others; who is late whatever
    is done comes behind those that can still be in time. Urgent are also those that together with
    all that is due before them make up more than half of what the lane can do until then.

    Every batch, each tenant with ready samples earns the same share of the places, divided evenly
    among its scenes; what one has no use for is divided among the others of that tenant first. A
    flow (a tenant's scene) spends what it has earned in whole places and keeps the rest for later
    batches; places that nobody has earned go to whoever has earned most. A flow that was not there
    begins with one place, so that it is in the very next batch.

    Within a flow the jobs that came first go first: they end sooner than if all were advanced
    evenly, and nobody ends later.

    Source: Shreedhar and Varghese, Efficient fair queuing using deficit round-robin, 1996.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._earned: dict[Flow, float] = {}

    def choose(self, ready: Sequence[Ready]) -> dict[Hashable, int]:
        """How many samples of which jobs make the next step.

        Args:
            ready: In the order in which the jobs came.

        Returns:
            Samples by job; together at most ``places``, and as many where so many are ready.
        """
        chosen: dict[Hashable, int] = {}
        left = self.places
        urgent = _urgent(ready)
        for job in sorted(urgent, key=lambda job: (job.hopeless, job.slack_s or 0.0)):
            taken = min(job.count, left)
            if taken:
                chosen[job.key] = taken
            left -= taken
        flows: dict[Flow, list[Ready]] = {}
        for job in ready:
            if job not in urgent:
                flows.setdefault((job.tenant, job.scene), []).append(job)
        new = [flow for flow in flows if flow not in self._earned]
        self._earn(flows, left)
        # Newcomers first, then who has earned most; within that in the order of arrival.
        order = sorted(flows, key=lambda flow: (flow not in new, -self._earned[flow]))
        for flow, count in self._shares(flows, order, left).items():
            for job in flows[flow]:
                taken = min(job.count, count)
                if taken:
                    chosen[job.key] = taken
                count -= taken
        return chosen

    def _earn(self, flows: dict[Flow, list[Ready]], places: int) -> None:
        """Give every flow its share; who has nothing to do keeps nothing."""
        wanted = {flow: sum(job.count for job in jobs) for flow, jobs in flows.items()}
        of_tenants: Counter[str] = Counter()
        for (tenant, _), count in wanted.items():
            of_tenants[tenant] += count
        shares: dict[Flow, float] = {}
        for tenant, part in evenly(of_tenants, places).items():
            mine = {flow: count for flow, count in wanted.items() if flow[0] == tenant}
            shares |= evenly(mine, part)
        bound = float(self.places)
        earned = {}
        for flow, share in shares.items():
            # A new flow has its place at once, however many there are.
            before = self._earned.get(flow, max(0.0, 1.0 - share))
            earned[flow] = min(bound, max(-bound, before + share))
        self._earned = earned

    def _shares(
        self, flows: dict[Flow, list[Ready]], order: list[Flow], places: int
    ) -> dict[Flow, int]:
        """Places of each flow, given out in this order."""
        shares = dict.fromkeys(flows, 0)
        open_ = {flow: sum(job.count for job in jobs) for flow, jobs in flows.items()}
        for flow in order:
            taken = min(max(0, math.floor(self._earned[flow] + 1e-9)), open_[flow], places)
            places -= self._spend(flow, taken, shares, open_)
        while places:
            wanting = [flow for flow in flows if open_[flow]]
            if not wanting:
                break
            flow = max(wanting, key=lambda flow: self._earned[flow])
            places -= self._spend(flow, 1, shares, open_)
        return shares

    def _spend(
        self, flow: Flow, count: int, shares: dict[Flow, int], open_: dict[Flow, int]
    ) -> int:
        shares[flow] += count
        open_[flow] -= count
        self._earned[flow] -= count
        return count


def _urgent(ready: Sequence[Ready]) -> list[Ready]:
    """Jobs whose deadlines, or those of jobs due after them, leave no time for fair shares."""
    hopeful = [job for job in ready if job.slack_s is not None and not job.hopeless]
    hopeful.sort(key=lambda job: job.due_s)
    total, together = 0.0, 0
    for count, job in enumerate(hopeful, 1):
        total += job.work_s
        if job.due_s < 2 * total:
            together = count
    return [
        *hopeful[:together],
        *(job for job in ready if job.urgent and job not in hopeful[:together]),
    ]


def evenly(wanted: Mapping[Key, int], places: float) -> dict[Key, float]:
    """Divide places evenly among those who want some; nobody gets more than it wants."""
    shares: dict[Key, float] = {}
    for key in sorted(wanted, key=lambda key: wanted[key]):
        shares[key] = min(float(wanted[key]), places / (len(wanted) - len(shares)))
        places -= shares[key]
    return shares
