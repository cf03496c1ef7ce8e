"""One resident base, one lane: jobs of many scenes share it step by step."""

from service.engine.engine import Engine
from service.engine.halving import Halving
from service.engine.job import Job, Sampled
from service.engine.metrics import EngineMetrics
from service.engine.runner import Runner
from service.engine.swap import Swapper

__all__ = ["Engine", "EngineMetrics", "Halving", "Job", "Runner", "Sampled", "Swapper"]
