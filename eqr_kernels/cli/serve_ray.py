"""`eqr serve --engine ray`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import FrameType
from typing import Any

from eqr_kernels.cli.console import busy
from eqr_kernels.cli.engines import ENGINES
from eqr_kernels.distributed import online
from eqr_kernels.distributed.on_ray import connected, room_for
from eqr_kernels.reasoner import EquilibriumReasoner


@dataclass(frozen=True)
class Cluster:
    """Where and how wide it serves.

    Attributes:
        replicas: "LEAST:MOST" or their number; None is from 1 to as many as there is room for.
        cpus: of each. grace: seconds that a stop may take.
    """

    address: str | None
    replicas: str | None
    cpus: int
    host: str
    port: int
    grace: int


def check_ray_options(engine: str, *, port: int, **given: Any) -> None:
    """Raises a ValueError where --engine is unknown, or has options of the other."""
    if engine not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "ray":
        replicas_of(given["replicas"], 1)
        if port == 0:
            raise ValueError("--port 0 is for --engine local: Ray Serve does not tell which port it took; name one")
        return
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for --engine ray, and --engine is local; leave one out")


def replicas_of(text: str | None, room: int) -> tuple[int, int]:
    """Least and most.

    Raises:
        ValueError: neither a number nor LEAST:MOST.
    """
    if text is None:
        return 1, room
    least, _, most = text.rpartition(":")
    try:
        numbers = int(least or most), int(most)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"--replicas must be LEAST:MOST, as in 1:4, or a number of at least 1, got {text!r}")
    return numbers


def serve_on_ray(
    cluster: Cluster,
    model: EquilibriumReasoner,
    task: str,
    engine: Mapping[str, Any],
    app: Mapping[str, Any],
    ready: Callable[[str], object],
) -> None:
    """Serves until Ctrl-C or SIGTERM, and then answers what is in flight; a second signal stops at once.

    Args:
        task: as another machine finds it.
        engine, app: options of `Engine` and of `create_app`.
        ready: called with what serves, when requests are answered.

    Raises:
        ValueError: no room for a replica.
        RuntimeError: no such cluster, or Ray Serve could not start.
    """
    stdout = sys.stdout
    # Ray tells of lost workers on stdout, which is for where it listens.
    with redirect_stdout(sys.stderr), connected(cluster.address), ExitStack() as open_until_stopped:
        with busy("starting replicas on Ray"):
            room = room_for(cluster.cpus, 1 if model.device.type == "cuda" else 0)
            least, most = replicas_of(cluster.replicas, room)
            if least > room:
                raise ValueError(
                    f"the cluster has room for {room} replicas of {cluster.cpus} CPUs, and --replicas asks for "
                    f"{least}; ask for fewer, or add machines first"
                )
            application = online.application(
                model, task, replicas=(least, most), cpus=cluster.cpus, grace=cluster.grace, engine=engine, app=app
            )
            open_until_stopped.enter_context(online.running(application, cluster.host, cluster.port))
        replicas = f"{least} to {most}" if least < most else f"{most}"
        with _signals() as stop_requested:
            with redirect_stdout(stdout):
                ready(f"Ray, replicas: {replicas}")
            stop_requested.wait()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set at SIGINT or SIGTERM while the block runs."""
    stop_requested = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop_requested.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
