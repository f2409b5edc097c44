"""The engine that runs on a Ray cluster: Ray Data streams the units to a pool of actors, each with the model."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Generator, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eqr_kernels.arguments import check_count
from eqr_kernels.distributed.engines import Finished
from eqr_kernels.distributed.job import Job, PackedModel
from eqr_kernels.distributed.optional import arrow, ray
from eqr_kernels.distributed.reading import Reader
from eqr_kernels.distributed.units import Key, Unit, stream_of, tables_of
from eqr_kernels.reasoner import EquilibriumReasoner

_FILES_AT_ONCE = 2
_UNITS_AHEAD = 2
"""Units that wait at an actor: it need not wait, and little is done again when it is lost."""


@dataclass(frozen=True)
class OnRay:
    """On the machines of a Ray cluster.

    Ray Data reads the input on the machine where the command was given, a task for each file, and streams the units to
    a pool of actors. The weights are in the object store, once on each machine. What is lost with an actor or a machine
    is done again by Ray, elsewhere; a unit that was given back is never asked for again.

    Attributes:
        address: of the cluster, "auto" or "HOST:PORT"; None is that of RAY_ADDRESS, else a cluster of this machine
            alone for the time of the run. Where this process is connected already, that cluster is taken.
        workers: actors at most; None is as many as the cluster has room for.
        cpus: of each actor, and threads that it computes on.
    """

    address: str | None = None
    workers: int | None = None
    cpus: int = 1

    def __post_init__(self) -> None:
        check_count("cpus", self.cpus)
        if self.workers is not None:
            check_count("workers", self.workers)
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"address {self.address!r} is that of a Ray Client, from which Ray Data cannot read files; give the "
                "command on a machine of the cluster, with 'auto', or submit it there with `ray job submit`"
            )

    def run(self, reader: Reader, skip: Set[Key], model: EquilibriumReasoner, job: Job) -> Generator[Finished]:
        rays = ray()
        packed, weights = PackedModel.of(model, job.settings)
        with connected(self.address), _settings():
            gpus = 1 if packed.device == "cuda" else 0
            room = room_for(self.cpus, gpus)
            size = min(room, self.workers or room)
            held = rays.put(weights)
            # Reading asks for no CPU: where actors have them all, it would never begin.
            units = rays.data.read_datasource(
                _datasource(reader, frozenset(skip)),
                override_num_blocks=reader.files,
                num_cpus=0,
                concurrency=min(_FILES_AT_ONCE, reader.files),
            )
            tables = units.map_batches(
                Actor,
                batch_size=1,
                batch_format="pyarrow",
                compute=rays.data.ActorPoolStrategy(
                    min_size=1, initial_size=size, max_size=size, max_tasks_in_flight_per_actor=_UNITS_AHEAD
                ),
                fn_constructor_args=(packed, [held], job, self.cpus),
                num_cpus=self.cpus,
                num_gpus=gpus,
            )
            batches = tables.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
            with _reasons():
                for batch in batches:
                    yield _finished(batch)


def room_for(cpus: int, gpus: int) -> int:
    """How many workers of so many CPUs and GPUs (0 or 1) the machines of the cluster have room for.

    Raises:
        ValueError: for none.
    """
    nodes = [node["Resources"] for node in ray().nodes() if node["Alive"]]
    counts = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    room = sum(min(cpu // cpus, gpu // gpus) if gpus else cpu // cpus for cpu, gpu in counts)
    if not room:
        shown = ", ".join(f"{cpu} CPUs and {gpu} GPUs" for cpu, gpu in counts)
        raise ValueError(
            f"no machine of the cluster has room for a worker of {cpus} CPUs{' and a GPU' if gpus else ''}: "
            f"they have {shown}; ask for fewer"
        )
    return room


class Actor:
    """Works on units with a model of its own, in a process of Ray's."""

    def __init__(self, packed: PackedModel, weights: list[Any], job: Job, cpus: int) -> None:
        torch.set_num_threads(cpus)
        self._work = job.work(packed.unpack(ray().get(weights[0])))

    def __call__(self, batch: Any) -> Any:
        done = []
        for data in batch["unit"]:
            unit = Unit.from_bytes(data.as_buffer())
            file, place = unit.key
            table = stream_of(self._work(unit))
            done.append({"file": file, "place": place, "rows": len(unit), "share": unit.share, "table": table})
        return arrow().Table.from_pylist(done)


def _finished(batch: Any) -> Finished:
    (row,) = batch.to_pylist()
    (table,) = tables_of(row["table"], 1)
    return Finished(Key(row["file"], row["place"]), table, row["rows"], row["share"])


def _blocks(reader: Reader, file: int, skip: Set[Key]) -> Iterator[Any]:
    """Each unit of a file as a block of one row."""
    for unit in reader.read(file, skip):
        yield arrow().table({"unit": [unit.to_bytes()]})


def _datasource(reader: Reader, skip: Set[Key]) -> Any:
    """The input as Ray Data reads it: a task for each file, all on the machine of this process."""
    data = ray().data
    from ray.data.block import BlockMetadata

    class Units(data.Datasource):  # type: ignore[name-defined]
        @property
        def supports_distributed_reads(self) -> bool:
            return False

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None) -> Any:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [
                data.ReadTask(functools.partial(_blocks, reader, file, skip), unknown) for file in range(reader.files)
            ]

    return Units()


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what Ray raises, a traceback of all processes in one text, into what was raised on a worker."""
    errors = ray().exceptions
    try:
        yield
    except errors.RayError as error:
        raised = re.search(r"^(?!ray[.:])[A-Za-z_][\w.]*: .+", str(error), re.MULTILINE)
        reason = raised[0] if raised else (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"the work failed on the cluster: {reason}") from error


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster at that address; one that was there before is kept."""
    rays = ray()
    if rays.is_initialized():
        yield
        return
    # Of a cluster that is made here; nothing is sent anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's C++ writes warnings about Ray Data's own actors to the terminal; what fails comes as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own = dict(include_dashboard=False) if where == "local" else {}
    try:
        rays.init(address=where, **own, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"no Ray cluster answers at {where!r}: {error}") from error
    try:
        yield
    finally:
        rays.shutdown()


@contextmanager
def _settings() -> Iterator[None]:
    """How Ray Data is to run: a unit a block, and not a word on the terminal."""
    context_of = ray().data.DataContext
    mine = context_of.get_current().copy()
    mine.target_max_block_size = 1  # bytes: any row fills a block, so that units are not put together
    mine.enable_progress_bars = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what fails is raised
    try:
        with context_of.current(mine):
            yield
    finally:
        logger.setLevel(level)
