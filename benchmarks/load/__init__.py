"""Open-loop load: requests leave when they are due, however slow the answers are."""

from benchmarks.load.driver import Payload, Sample, drive, is_loopback, read_payload, warm_up
from benchmarks.load.plan import Arrival, arrivals
from benchmarks.load.report import Conditions, percentile, summarize, write

__all__ = [
    "Arrival",
    "Conditions",
    "Payload",
    "Sample",
    "arrivals",
    "drive",
    "is_loopback",
    "percentile",
    "read_payload",
    "summarize",
    "warm_up",
    "write",
]
