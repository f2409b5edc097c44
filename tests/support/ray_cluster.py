"""A Ray cluster of two nodes in one process tree, and a limit to how long it may take."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SECONDS = 240
"""For a test, and for the start of the cluster: ten times what either takes."""


@dataclasses.dataclass
class time_limit:  # noqa: N801
    """Raises in the main thread when it is over; elsewhere there is none."""

    what: str

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before: Any = signal.signal(signal.SIGALRM, self._over)
            self.left = signal.alarm(SECONDS)

    def _over(self, *_: Any) -> None:
        raise TimeoutError(f"{self.what} took more than {SECONDS} s")

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.alarm(self.left)
            signal.signal(signal.SIGALRM, self.before)


@contextmanager
def two_nodes(**environment: str) -> Iterator[Any]:
    """A head and a second node of one CPU each, and a connection of this process to them.

    Args:
        environment: of the cluster's processes.
    """
    import ray
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = dict(num_cpus=1, object_store_memory=80 << 20)
    # A lost node is noticed in seconds.
    noticing = dict(health_check_period_ms=500, health_check_failure_threshold=4, health_check_initial_delay_ms=0)
    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            with time_limit("the cluster's start"):
                made.add_node(**node, include_dashboard=False, _system_config=noticing)
                made.second = made.add_node(**node)
                ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            with time_limit("the cluster's end"):
                ray.shutdown()
                made.shutdown()
