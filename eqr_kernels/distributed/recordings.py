"""Recordings of trajectories in parts: what `eqr eval` and `eqr curve` compute their reports from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.distributed.engines import Engine, run_into
from eqr_kernels.distributed.job import Work
from eqr_kernels.distributed.optional import arrow
from eqr_kernels.distributed.reading import PuzzleReader
from eqr_kernels.distributed.units import Key, Unit
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.curve import CurveMap
from eqr_kernels.studies.other_solutions import OtherSolutions
from eqr_kernels.studies.recording import ARRAYS, Recording, join, record
from eqr_kernels.studies.types import Bools
from eqr_kernels.tasks.common import ParseErrors
from eqr_kernels.tasks.registry import find_task
from eqr_kernels.tasks.task import symmetries_of

_OTHER, _METADATA = "other_solution", b"eqr_recording"


@dataclass(frozen=True)
class Recorded:
    """Records the trajectories of each unit, all of whose puzzles have answers.

    Attributes:
        task: as `find_task` takes it.
        settings: arguments of `record`.
        views: the trajectories of a puzzle get a view each, see `solve_views`.
        turn_every: outer steps between turns, see `turns` of `solve`; None: no turns.
        others: also mark the answers that solve a puzzle and are not the given one.
    """

    task: str
    settings: dict[str, Any]
    others: bool = True
    views: bool = False
    turn_every: int | None = None

    def work(self, model: EquilibriumReasoner) -> Work:
        task = find_task(self.task)
        symmetries = symmetries_of(task, self.settings["seed"], views=self.views, turn_every=self.turn_every)

        def recorded(unit: Unit) -> Any:
            p = unit.puzzles
            assert p.labels is not None and p.line is not None
            others = OtherSolutions(task.check, p.inputs)
            watch = others.observe if self.others else None
            recording = record(model, p.inputs, p.labels, observe=watch, **symmetries, **self.settings)
            return to_table(recording, others.marks if self.others else None, p.line, p.source)

        return recorded


def to_table(
    recording: Recording, others: Bools | None, line: npt.NDArray[np.int64], source: npt.NDArray[np.str_]
) -> Any:
    """A recording of n puzzles as a table: a row for each, in which an array is a list, restarts first.

    Args:
        others: bool [n, B, K], see `OtherSolutions.marks`; None where they were not looked for.
    """
    pa = arrow()
    arrays = recording.arrays() | ({} if others is None else {_OTHER: others})
    metadata = {
        "shapes": {name: list(array.shape[1:]) for name, array in arrays.items()},
        "depths": list(recording.depths),
        "recording": recording.metadata(),
    }
    columns = {"line": pa.array(line, pa.int64()), "source": pa.array(source.tolist(), pa.string())}
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(len(array), -1)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.table(columns).replace_schema_metadata({_METADATA: json.dumps(metadata).encode()})


def from_table(table: Any) -> tuple[Recording, Bools | None]:
    """What `to_table` took: the recording, and the marks of other solutions if they are there."""
    metadata = json.loads(table.schema.metadata[_METADATA])

    def array(name: str) -> Any:
        flat = table[name].combine_chunks()
        flat = flat.chunk(0) if hasattr(flat, "chunk") else flat
        return flat.flatten().to_numpy(zero_copy_only=False).reshape(len(table), *metadata["shapes"][name])

    recording = Recording(tuple(metadata["depths"]), **{name: array(name) for name in ARRAYS}, **metadata["recording"])
    return recording, array(_OTHER) if _OTHER in metadata["shapes"] else None


def gather(tables: Iterable[Any]) -> tuple[Recording, Bools]:
    """Parts with marks, in the order of the input, as one recording [N, ...] and its marks."""
    parts, others = zip(*map(from_table, tables), strict=True)
    return join(parts), np.concatenate(others)


def fill(engine: Engine, mapping: CurveMap, task: str, progress: Callable[[float, int], object] | None = None) -> None:
    """Records what the map of `eqr curve` has not recorded yet, and keeps each part as it is done.

    Args:
        task: as `find_task` takes it. progress: as for `run_into`.
    """
    request = mapping.request
    run = dict(depths=mapping.recorded, breadth=request.breadth, seed=request.seed, **request.options)
    reader = PuzzleReader(mapping.puzzles, ParseErrors(), "", mapping.chunk)
    turn_every = None if request.turns is None else request.turns.every
    job = Recorded(task, run, others=False, views=request.views is not None, turn_every=turn_every)
    run_into(_Parts(mapping), engine, reader, mapping.model, job, progress)


class _Parts:
    """The parts that a map keeps, by their units."""

    def __init__(self, mapping: CurveMap) -> None:
        self._mapping = mapping
        starts = range(0, len(mapping.puzzles), mapping.chunk)
        there = [place for place, start in enumerate(starts) if mapping.store.load(start) is not None]
        self.finished = {Key(0, place) for place in there}

    def write(self, key: Key, table: Any) -> None:
        self._mapping.store.save(key.place * self._mapping.chunk, from_table(table)[0])
