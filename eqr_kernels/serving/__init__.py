"""Requests that join a running solve."""

from eqr_kernels.serving.engine import Engine
from eqr_kernels.serving.errors import DeadlineExceeded, EngineClosed, QueueFull
from eqr_kernels.serving.runner import StepUpdate
from eqr_kernels.serving.stats import EngineStats
from eqr_kernels.serving.stream import Stream

__all__ = ["DeadlineExceeded", "Engine", "EngineClosed", "EngineStats", "QueueFull", "StepUpdate", "Stream"]
