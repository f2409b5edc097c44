"""--engine and --out of the commands: where the work is done, and results that are written as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from eqr_kernels.cli.console import Bar
from eqr_kernels.distributed.engines import Engine, Local, run_into
from eqr_kernels.distributed.job import Job
from eqr_kernels.distributed.on_ray import OnRay
from eqr_kernels.distributed.reading import PuzzleReader, Reader
from eqr_kernels.distributed.recordings import Recorded, gather
from eqr_kernels.distributed.shards import InMemory, Results, Shards
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.identity import weights_digest, what_decides
from eqr_kernels.studies.other_solutions import OtherSolutions
from eqr_kernels.studies.recording import FORMAT, Recording
from eqr_kernels.studies.store import OtherRecording
from eqr_kernels.tasks.common import ParseErrors, PuzzleSet
from eqr_kernels.tasks.registry import is_object
from eqr_kernels.tasks.task import Task

ENGINES = ("local", "ray")
DECIDES = ("window", "noise_scale", "backend", "precision")
"""Options of `solve` whose meaning `what_decides` tells."""


def engine_of(name: str, address: str | None, workers: int | None, cpus: int | None) -> Engine:
    """The engine that --engine and its options name.

    Raises:
        ValueError: there is none of that name, or options of another were given.
    """
    if name not in ENGINES:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "ray":
        return OnRay(address, workers, 1 if cpus is None else cpus)
    given = {"--address": address, "--workers": workers, "--cpus-per-worker": cpus}
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option} is for --engine ray, and --engine is local; leave one out")
    return Local()


def task_spec(wanted: str | None, task: Task) -> str:
    """The task as another machine finds it, see `find_task`."""
    if wanted is None or not is_object(wanted):
        return task.name
    place, _, name = wanted.rpartition(":")
    path = Path(place).expanduser()
    return f"{path.absolute()}:{name}" if path.suffix == ".py" else wanted


def symmetries_as_settings(views: bool, turn_every: int | None) -> dict[str, Any]:
    """Of results: nothing where there are none, as it stands in results of before there were any."""
    return {**(dict(views=True) if views else {}), **({} if turn_every is None else dict(turn_every=turn_every))}


def open_shards(out: Path, model: EquilibriumReasoner, options: dict[str, Any], **settings: Any) -> Shards:
    """The folder --out, for results of these settings.

    Args:
        options: of `solve`: window, noise_scale, backend, precision. settings: all else that the results depend on.

    Raises:
        ValueError: it holds results of others.
    """
    try:
        decides = what_decides(model, options, turns=settings.get("turn_every") is not None)
        return Shards(out, {**settings, "weights": weights_digest(model), **decides})
    except OtherRecording as error:
        raise ValueError(f"{error} (name another --out, or remove the folder)") from None


def run_all(
    text: str, show: bool | None, results: Results, engine: Engine, reader: Reader, model: EquilibriumReasoner, job: Job
) -> tuple[int, float]:
    """Runs what is not in the results yet, with a bar of that text: the rows that were run, and the seconds."""
    begun = time.perf_counter()
    with working(text, show) as bar:
        rows = run_into(results, engine, reader, model, job, rows_shown(bar))
    return rows, time.perf_counter() - begun


@contextmanager
def working(text: str, show: bool | None) -> Iterator[Bar]:
    """The bar of an engine's work. Ray tells of lost workers on stdout, which is the report's: to stderr with it."""
    with Bar(text, show) as bar, redirect_stdout(sys.stderr):
        yield bar


def rows_shown(bar: Bar) -> Callable[[float, int], None]:
    """Shows the progress of `run_into`."""
    return lambda share, rows: bar.update(share, 1.0, f"{rows:,} rows")


def record_elsewhere(
    job: Recorded,
    engine: Engine,
    model: EquilibriumReasoner,
    puzzles: PuzzleSet,
    others: OtherSolutions,
    out: Path | None,
    rows: int,
    show: bool | None,
) -> Recording:
    """What `record` gives of all puzzles, by an engine in units of `rows`; kept in the folder `out` if there is one.

    Args:
        job: what is recorded. others: is told of the answers that solve a puzzle and are not the given one.
    """
    reader = PuzzleReader(puzzles, ParseErrors(), "puzzles", rows)
    results: Shards | InMemory = InMemory()
    if out is not None:
        given = {name: value for name, value in job.settings.items() if name not in ("slots", *DECIDES)}
        settings = {name: job.settings[name] for name in DECIDES}
        inputs = dict(command="eval", format=FORMAT, task=job.task, rows=rows, input=reader.identity())
        inputs |= symmetries_as_settings(job.views, job.turn_every)
        results = open_shards(out, model, settings, **inputs, **given)
    try:
        run_all("evaluating", show, results, engine, reader, model, job)
    except KeyboardInterrupt:
        if isinstance(results, Shards):
            raise kept_in(results) from None
        raise
    recording, marks = gather(results.tables())
    others.known(marks)
    return recording


def kept_in(shards: Shards) -> KeyboardInterrupt:
    """The interruption of a run that is kept."""
    return KeyboardInterrupt(
        f"interrupted; {len(shards.finished)} shards are kept in {shards.folder}, and the same command goes on from "
        "there"
    )
