"""`eqr solve`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import (
    BAD_INPUT,
    INCOMPLETE,
    Bar,
    busy,
    check_output,
    command,
    emit,
    parse_counts,
)
from eqr_kernels.cli.engines import engine_of, task_spec
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.solve_table import TableRequest, solve_table
from eqr_kernels.cli.tolerance import as_settings, parse_tolerance, refuse_tolerance, settling_tolerance
from eqr_kernels.distributed.units import DEFAULT_ROWS
from eqr_kernels.results import SolveResult
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.solver import DEFAULT_DEPTH
from eqr_kernels.studies import exact_match
from eqr_kernels.tasks.common import ParseErrors, PuzzleSet, rating_number
from eqr_kernels.tasks.task import CountsSolutions, Task, generated
from eqr_kernels.views import solve_puzzles

_DEMO, _SMALL = 12, 100
"""Puzzles of --demo, half of them where one has more tokens than `_SMALL`."""
_DEMO_SEED = 2026


@command
def solve(
    file: Annotated[
        str | None,
        typer.Argument(help="Puzzles: a line each, grids, CSV, JSON, .npy, ..., a folder of them, or - for stdin."),
    ] = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    depth: opt.Depth = DEFAULT_DEPTH,
    breadth: opt.Breadth = None,
    views: opt.Views = None,
    turn_every: opt.TurnEvery = None,
    halt: opt.Halt = "residual",
    tol: opt.Tol = "auto",
    patience: Annotated[int, typer.Option(help="Consecutive steps at or below --tol.")] = 1,
    select: opt.Select = "residual",
    window: opt.Window = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    demo: Annotated[bool, typer.Option("--demo", help="Solve generated puzzles, some easy, some hard.")] = False,
    limit: opt.Limit = None,
    reveal: opt.Reveal = None,
    check: Annotated[
        bool, typer.Option("--check", help="Sudoku: also count the solutions of each puzzle: none, one or several.")
    ] = False,
    by_depth: Annotated[
        str | None, typer.Option(metavar="DEPTHS", help="Also count right answers after these steps, as in 1,2,4,8,16.")
    ] = None,
    format: opt.Format = "auto",
    values: opt.Values = "auto",
    split: opt.Split = None,
    engine: opt.Engine = "local",
    address: opt.Address = None,
    workers: opt.Workers = None,
    cpus_per_worker: opt.CpusPerWorker = None,
    out: opt.Out = None,
    shard_rows: opt.ShardRows = None,
    grids: Annotated[bool, typer.Option("--grids/--no-grids", help="Draw each grid, or print a line for each.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the summary only.")] = False,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Solve puzzles, each until its own latent state has settled.

    --out writes a row for each row of the input, CSV or Parquet of any size (a file, or a folder of them) or any other
    form, and prints the summary only. With --engine ray, workers on all machines of a Ray cluster solve them; the rows
    are the same, bit for bit. Stopped and given again, the command goes on where it stopped.

    Exit code 0: every puzzle was read and tried (one that stays unsolved is a result, not a failure); 1: some lines
    were no puzzles, the others were tried; 2: nothing could be done; 130: interrupted, nothing was written (with --out:
    what was done is kept).
    """
    check_output(output)
    if demo and file is not None:
        raise ValueError(f"--demo makes its own puzzles, and FILE {file!r} was given too; leave one out")
    depths = () if by_depth is None else parse_counts("--by-depth", by_depth)
    if depths and depths[-1] > depth:
        raise ValueError(f"--by-depth must be at most --depth {depth}, got {depths[-1]}; raise --depth")
    runner = engine_of(engine, address, workers, cpus_per_worker)
    if out is None and (engine != "local" or shard_rows is not None):
        raise ValueError("--engine ray and --shard-rows write to a folder; name it with --out, as in answers.parquet")
    if out is not None and (demo or depths):
        raise ValueError(
            f"--out writes a table, which has no place for {'--demo' if demo else '--by-depth'}; leave it out"
        )
    if views is not None and breadth is not None:
        raise ValueError(
            f"--views has a trajectory for each view, and --breadth {breadth} was given too; leave one out"
        )
    if views is not None and select == "first" and depths:
        raise ValueError("--select first does not run all views, and --by-depth counts all; leave one out")
    wanted_tol = parse_tolerance(tol)
    if halt not in RULES_WITH_TOLERANCE:
        refuse_tolerance(wanted_tol, halt)
    settings: dict[str, Any] = dict(
        depth=depth,
        breadth=views or (1 if breadth is None else breadth),
        halt=halt,
        patience=patience,
        select=select,
        window=window,
        noise_scale=noise_scale,
        seed=seed,
        slots=slots,
        backend=backend,
        precision=precision,
    )
    reasoner = puz.load_model(model, device, progress)
    seq_len = reasoner.config.seq_len
    its_task = puz.task_for(task, reasoner)
    make_views = None if views is None else puz.views_for(its_task, seq_len, views, seed, f"--views {views}")
    turns = puz.turns_for(its_task, turn_every, depth, seed)
    reading: dict[str, Any] = dict(format=format, values=values, split=split, limit=limit, show=progress)
    if out is not None:
        request = TableRequest(
            file,
            reading,
            reveal,
            check,
            task_spec(task, its_task),
            out,
            shard_rows or DEFAULT_ROWS,
            views is not None,
            turn_every,
            settings,
            wanted_tol,
        )
        return solve_table(request, model, reasoner, its_task, runner, as_json=as_json, output=output, show=progress)
    errors = ParseErrors()
    if demo:
        with busy("generating puzzles", progress):
            puzzles = generated(its_task, seq_len, _DEMO if seq_len <= _SMALL else _DEMO // 2, _DEMO_SEED)
        puzzles = puzzles.subset(slice(limit))
    else:
        puzzles, errors = puz.read_puzzles(its_task, seq_len, file, **reading)
    puz.report_errors(errors)
    puzzles = puz.reveal_clues(its_task, puzzles, reveal, seed)
    result, seconds, tolerance = None, 0.0, None
    if len(puzzles):
        if halt in RULES_WITH_TOLERANCE:
            run: dict[str, Any] = dict(depth=depth, seed=seed, slots=slots, backend=backend, precision=precision)
            tolerance = settling_tolerance(reasoner, puzzles.inputs, wanted_tol, noise_scale, **run)
            settings["tol"] = tolerance.value
        begun = time.perf_counter()
        with Bar("solving", progress) as bar:

            def show(finished: int, of: int, spent: int) -> None:
                bar.update(max(finished / of, spent / (of * depth)), 1.0, f"{finished}/{of} done")

            result = solve_puzzles(
                reasoner, puzzles.inputs, views=make_views, turns=turns, checkpoints=depths, progress=show, **settings
            )
        seconds = time.perf_counter() - begun
    rows = _rows(its_task, puzzles, result)
    # What was filled is only solved where nothing else could have been.
    counted = [i for i, row in enumerate(rows) if check or (isinstance(its_task, CountsSolutions) and row["valid"])]
    if counted:
        for i, solutions in zip(counted, puz.solutions(its_task, puzzles.subset(counted), progress), strict=True):
            rows[i]["solutions"] = solutions
    at = _by_depth(its_task, puzzles, result)
    report: dict[str, Any] = {
        "command": "solve",
        "model": model,
        "task": its_task.name,
        "settings": {
            **settings,
            **as_settings(tolerance),
            "views": views is not None,
            "turn_every": turn_every,
            "device": str(reasoner.device),
            "reveal": reveal,
        },
        "backend": result.backend if result else None,
        "backend_reason": result.backend_reason if result else None,
        "puzzles": rows,
        "errors": puz.errors_as_json(errors),
        "by_depth": at,
        "summary": _summary(rows, depth * settings["breadth"], errors.total, seconds),
    }
    emit(report, as_json, output)
    if not as_json:
        if not quiet:
            drawing.puzzles(its_task, puzzles, result, rows, grids)
        drawing.by_depth(at)
        drawing.summary(report["summary"])
    if errors:
        return INCOMPLETE if len(puzzles) else BAD_INPUT
    return 0


def _rows(task: Task, puzzles: PuzzleSet, result: SolveResult | None) -> list[dict[str, Any]]:
    """What became of each puzzle, ready for JSON."""
    if result is None:
        return []
    preds = result.preds.cpu().numpy()
    valid = task.check(puzzles.inputs, preds)
    correct = _correct(puzzles, preds)
    return [
        {
            "number": i + 1,
            "line": None if puzzles.line is None else int(puzzles.line[i]),
            "id": None if puzzles.id is None else str(puzzles.id[i]),
            "source": str(puzzles.source[i]),
            "rating": rating_number(puzzles.rating[i]),
            "puzzle": task.decode(puzzles.inputs[i]),
            "prediction": task.decode(preds[i]),
            "answer": None if correct[i] is None or puzzles.labels is None else task.decode(puzzles.labels[i]),
            "valid": bool(valid[i]),
            "correct": correct[i],
            "other_valid": bool(valid[i]) and correct[i] is False,
            "solutions": None,
            **row,
        }
        for i, row in enumerate(result.rows())
    ]


def _correct(puzzles: PuzzleSet, preds: npt.NDArray[np.integer]) -> list[bool | None]:
    """Whether each answer is the known one; None where none is known."""
    if puzzles.labels is None:
        return [None] * len(puzzles)
    right = exact_match(preds, puzzles.labels)
    return [bool(right[i]) if answer.any() else None for i, answer in enumerate(puzzles.labels)]


def _by_depth(task: Task, puzzles: PuzzleSet, result: SolveResult | None) -> list[dict[str, Any]]:
    """Right answers at each checkpoint; a trajectory that ended before counts as it ended."""
    rows = []
    for depth, at in (result.at if result else {}).items():
        preds = at.preds.cpu().numpy()
        correct = [c for c in _correct(puzzles, preds) if c is not None]
        valid = task.check(puzzles.inputs, preds)
        rows.append(
            {
                "depth": depth,
                "puzzles": len(puzzles),
                "valid": int(valid.sum()),
                "with_answers": len(correct),
                "correct": sum(correct),
                "converged": int(at.converged.sum()),
                "converged_invalid": int((at.converged.cpu().numpy() & ~valid).sum()),
                "nfe": int(at.all_steps.sum()),
            }
        )
    return rows


def _summary(rows: list[dict[str, Any]], full_depth: int, unread: int, seconds: float) -> dict[str, Any]:
    judged = [row["correct"] for row in rows if row["correct"] is not None]
    valid = sum(row["valid"] for row in rows)
    ambiguous = sum(row["valid"] and row["solutions"] == "several" for row in rows)
    return {
        "puzzles": len(rows),
        "unread": unread,
        "solved": valid - ambiguous,
        "filled_ambiguous": ambiguous,
        "with_answers": len(judged),
        "correct": sum(judged),
        "other_valid": sum(row["other_valid"] for row in rows),
        "converged": sum(row["converged"] for row in rows),
        "converged_invalid": sum(row["converged"] and not row["valid"] for row in rows),
        "mean_steps": sum(row["steps"] for row in rows) / len(rows) if rows else None,
        "nfe": sum(row["nfe"] for row in rows),
        "nfe_without_early_exit": full_depth * len(rows),
        "seconds": seconds,
    }
