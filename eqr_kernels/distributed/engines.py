"""Engines: what runs a job over the units of an input, here or on the machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Set
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from eqr_kernels.distributed.job import Job
from eqr_kernels.distributed.reading import Reader
from eqr_kernels.distributed.shards import Results
from eqr_kernels.distributed.units import Key, Unit
from eqr_kernels.reasoner import EquilibriumReasoner


@dataclass(frozen=True)
class Finished:
    """A unit that is done.

    Attributes:
        key: which. table: what came of it.
        rows: of the input. share: of the whole input, read when it was.
    """

    key: Key
    table: Any
    rows: int
    share: float


class Engine(Protocol):
    """Runs a job over the units of an input, each at least once and each given back once, in any order."""

    def run(self, reader: Reader, skip: Set[Key], model: EquilibriumReasoner, job: Job) -> Generator[Finished]: ...


class Local:
    """In this process, unit by unit, with all its threads."""

    def run(self, reader: Reader, skip: Set[Key], model: EquilibriumReasoner, job: Job) -> Generator[Finished]:
        work = job.work(model)
        for unit in units_of(reader, skip):
            yield Finished(unit.key, work(unit), len(unit), unit.share)


def units_of(reader: Reader, skip: Set[Key] = frozenset()) -> Iterator[Unit]:
    """All units, in the order of the input."""
    for file in range(reader.files):
        yield from reader.read(file, skip)


def run_into(
    results: Results,
    engine: Engine,
    reader: Reader,
    model: EquilibriumReasoner,
    job: Job,
    progress: Callable[[float, int], object] | None = None,
) -> int:
    """Runs what is not there yet; each unit is written as it is finished, so that a stop costs those in work alone.

    Args:
        progress: called with (share of the input that is done, about, and rows done now).

    Returns:
        Rows that were run now.
    """
    rows, share = 0, 0.0
    with closing(engine.run(reader, frozenset(results.finished), model, job)) as units:
        for done in units:
            results.write(done.key, done.table)
            rows, share = rows + done.rows, max(share, done.share)
            if progress is not None:
                progress(share, rows)
    return rows
