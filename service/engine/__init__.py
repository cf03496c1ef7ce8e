"""One resident base, one lane: adapters are swapped onto it and seeds sampled in batches."""

from service.engine.job import Job, Sampled
from service.engine.lane import Engine, EngineMetrics
from service.engine.runner import Runner
from service.engine.swap import Swapper

__all__ = ["Engine", "EngineMetrics", "Job", "Runner", "Sampled", "Swapper"]
