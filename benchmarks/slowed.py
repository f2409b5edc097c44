"""A pytest plugin that plants a slowdown in one op, for compare_trial.py: `pytest -p benchmarks.slowed`.

EQR_TRIAL_OP names a function of eqr_kernels.ops (or ops_training), EQR_TRIAL_PERCENT by how much each call of it is to
take longer: after it has returned, the caller spins for that share of what the call took. The package knows nothing of
it, and results are what they were.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from eqr_kernels import ops, ops_training

OP, PERCENT = "EQR_TRIAL_OP", "EQR_TRIAL_PERCENT"


def slowed(call: Callable[..., Any], percent: float) -> Callable[..., Any]:
    """`call`, and then nothing for that share of the time that it took."""

    @functools.wraps(call)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments, **options)
        end = time.perf_counter()
        while time.perf_counter() < end + (end - start) * percent / 100:
            pass
        return result

    return wrapped


def plant(name: str, percent: float) -> None:
    """Slows the op of that name down in this process."""
    module = ops_training if hasattr(ops_training, name) and not hasattr(ops, name) else ops
    if not hasattr(module, name):
        raise ValueError(f"{OP}={name!r} is no function of eqr_kernels.ops or eqr_kernels.ops_training")
    setattr(module, name, slowed(getattr(module, name), percent))


def pytest_configure() -> None:
    plant(os.environ[OP], float(os.environ[PERCENT]))
