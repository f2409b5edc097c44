"""`eqr solve --out`: all rows of a table of any size, here or on many machines, into Parquet."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import BAD_INPUT, INCOMPLETE, busy, emit
from eqr_kernels.cli.engines import DECIDES, kept_in, open_shards, run_all, symmetries_as_settings
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.tolerance import as_settings, settling_tolerance
from eqr_kernels.distributed.answers import Answering, Totals, errors_of, totals
from eqr_kernels.distributed.engines import Engine, units_of
from eqr_kernels.distributed.reading import PuzzleReader, Reader, TableReader, find_tables
from eqr_kernels.distributed.shards import check_folder
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.tasks.common import KEPT_ERRORS, ParseError, ParseErrors
from eqr_kernels.tasks.task import Task, symmetries_of
from eqr_kernels.tolerance import FIRST_ROWS
from eqr_kernels.views import solve_puzzles


@dataclasses.dataclass(frozen=True)
class TableRequest:
    """What `eqr solve --out` was asked for.

    Attributes:
        file, reading: puzzles, and further arguments of `read_puzzles`.
        reveal, check: as the options. task: as `find_task` takes it.
        out, rows: the folder, and rows of a shard.
        views, turn_every: as of `Answering`.
        settings: of `solve`. wanted_tol: what --tol says.
    """

    file: str | None
    reading: dict[str, Any]
    reveal: int | None
    check: bool
    task: str
    out: Path
    rows: int
    views: bool
    turn_every: int | None
    settings: dict[str, Any]
    wanted_tol: float | str


def solve_table(
    request: TableRequest,
    model_name: str,
    model: EquilibriumReasoner,
    task: Task,
    engine: Engine,
    *,
    as_json: bool,
    output: Path | None,
    show: bool | None,
) -> int:
    """Solves all rows into --out, prints what came of them, and returns the exit code."""
    check_folder(request.out)
    if request.check:
        puz.that_counts(task)
    reader, omitted = _reader(request, model, task)
    settings = dict(request.settings)
    tolerance = None
    if settings["halt"] in RULES_WITH_TOLERANCE:
        run = {name: settings[name] for name in ("depth", "seed", "slots", "backend", "precision")}
        first = _first_rows(reader, model.config.seq_len)
        tolerance = settling_tolerance(model, first, request.wanted_tol, settings["noise_scale"], **run)
        settings["tol"] = tolerance.value
    # Says of the arguments what it would say on a worker.
    symmetries = symmetries_of(task, settings["seed"], views=request.views, turn_every=request.turn_every)
    solve_puzzles(model, np.zeros((0, model.config.seq_len), np.uint8), **symmetries, **settings)
    given = {name: value for name, value in settings.items() if name not in ("slots", *DECIDES)}
    with busy("reading the input", show):
        input_identity = reader.identity()
    shards = open_shards(
        request.out,
        model,
        settings,
        command="solve",
        task=request.task,
        reveal=request.reveal,
        check=request.check,
        rows=request.rows,
        input=input_identity,
        **symmetries_as_settings(request.views, request.turn_every),
        **given,
    )
    there = len(shards.finished)
    try:
        ran, seconds = run_all(
            "solving",
            show,
            shards,
            engine,
            reader,
            model,
            Answering(request.task, settings, request.check, request.views, request.turn_every),
        )
    except KeyboardInterrupt:
        raise kept_in(shards) from None
    counted = totals(shards.tables())
    counted.unread += omitted
    errors = errors_of(shards.tables(), KEPT_ERRORS) if counted.unread else []
    named = [ParseError(error["line"], error["text"] or "", error["message"]) for error in errors]
    puz.report_errors(ParseErrors(named, counted.unread - len(named)))
    report: dict[str, Any] = {
        "command": "solve",
        "model": model_name,
        "task": task.name,
        "settings": {
            **settings,
            **as_settings(tolerance),
            "views": request.views,
            "turn_every": request.turn_every,
            "device": str(model.device),
            "reveal": request.reveal,
        },
        "out": str(request.out),
        "shards": {"rows": request.rows, "count": len(shards.finished), "found": there, "rows_run": ran},
        "errors": errors,
        "summary": _summary(counted, settings["depth"] * settings["breadth"], seconds),
    }
    emit(report, as_json, output)
    if not as_json:
        drawing.summary(report["summary"])
        again = f"; {there} of them were there" if there else ""
        drawing.lines(f"written: {request.out}, {len(shards.finished)} shards{again}")
    if not counted.puzzles and not counted.unread:
        raise ValueError(f"{request.file} holds no puzzles")
    return 0 if not counted.unread else INCOMPLETE if counted.puzzles else BAD_INPUT


def _reader(request: TableRequest, model: EquilibriumReasoner, task: Task) -> tuple[Reader, int]:
    """The input, and how many rows beyond the first unreadable ones were counted only."""
    file, reading, seq_len = request.file, request.reading, model.config.seq_len
    whole = request.reveal is not None or any(reading[name] is not None for name in ("limit", "split"))
    if file not in (None, "-") and Path(str(file)).exists() and not whole and reading["values"] == "auto":
        tables = find_tables(str(file), reading["format"])
        if tables:
            return TableReader(tables, request.task, seq_len, request.rows), 0
    puzzles, errors = puz.read_puzzles(task, seq_len, file, **reading)
    puzzles = puz.reveal_clues(task, puzzles, request.reveal, request.settings["seed"])
    name = "stdin" if file in (None, "-") else Path(str(file)).name
    return PuzzleReader(puzzles, errors, name, request.rows), errors.omitted


def _first_rows(reader: Reader, seq_len: int) -> npt.NDArray[np.uint8]:
    """Tokens [n, S] of the first puzzles, which a tolerance may be found on."""
    tokens = np.zeros((0, seq_len), np.uint8)
    for unit in units_of(reader):
        tokens = np.concatenate([tokens, unit.puzzles.inputs])[:FIRST_ROWS]
        if len(tokens) == FIRST_ROWS:
            break
    return tokens


def _summary(counted: Totals, full_depth: int, seconds: float) -> dict[str, Any]:
    """As that of `eqr solve` without --out."""
    numbers = dataclasses.asdict(counted)
    steps, valid, n = numbers.pop("steps"), numbers.pop("valid"), counted.puzzles
    return {
        **numbers,
        "solved": valid - counted.filled_ambiguous,
        "mean_steps": steps / n if n else None,
        "nfe_without_early_exit": full_depth * n,
        "seconds": seconds,
    }
