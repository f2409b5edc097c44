"""`eqr eval`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import INCOMPLETE, Bar, check_output, command, emit, parse_counts
from eqr_kernels.cli.engines import engine_of, record_elsewhere, task_spec
from eqr_kernels.cli.provenance import reproduction
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.tolerance import (
    as_settings,
    card_as_json,
    parse_tolerance,
    refuse_tolerance,
    settling_tolerance,
)
from eqr_kernels.distributed.recordings import Recorded
from eqr_kernels.distributed.shards import check_folder
from eqr_kernels.distributed.units import DEFAULT_ROWS
from eqr_kernels.run_rules import RULES_WITH_TOLERANCE
from eqr_kernels.solver import card_in
from eqr_kernels.studies import attractors
from eqr_kernels.studies.attractors import MODES, Modes
from eqr_kernels.studies.coupling import couple
from eqr_kernels.studies.other_solutions import OtherSolutions
from eqr_kernels.studies.recording import Recording, record
from eqr_kernels.studies.replay import check_rules, correct_grid, first_converged, settled
from eqr_kernels.studies.scoring import RATING_BANDS, Accuracy, by_group, rating_bands
from eqr_kernels.studies.subset import SUBSET_SEED
from eqr_kernels.studies.types import Bools
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tolerance import card_tolerance


@command
def evaluate(
    ctx: typer.Context,
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    depths: Annotated[str, typer.Option(help="Outer steps after which answers are counted.")] = "1,2,4,8,16,32,64",
    breadths: Annotated[
        str | None,
        typer.Option("--breadths", "--breadth", help="Trajectories of each puzzle, as in 1,8,32.", show_default="1"),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="V",
            help="In place of --breadths, as in 1,8: a trajectory for each of so many views of a puzzle, which are "
            "itself and others by symmetries that its task knows.",
        ),
    ] = None,
    turn_every: opt.TurnEvery = None,
    select: Annotated[
        str,
        typer.Option(
            help="Which trajectory answers: residual, vote, q, first (with --halt) or any (right if any trajectory is: "
            "an oracle); several, as in residual,vote,q,any. Tables by source and rating are for the first."
        ),
    ] = "residual",
    halt: opt.Halt = "none",
    tol: opt.Tol = "auto",
    broad: opt.Broad = None,
    window: opt.Window = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    limit: opt.Limit = None,
    subset: opt.Subset = None,
    reveal: opt.Reveal = None,
    format: opt.Format = "auto",
    split: opt.Split = None,
    engine: opt.Engine = "local",
    address: opt.Address = None,
    workers: opt.Workers = None,
    cpus_per_worker: opt.CpusPerWorker = None,
    out: opt.Out = None,
    shard_rows: opt.ShardRows = None,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Measure exact accuracy by depth and breadth, all from one run of the greatest depth and breadth.

    A deeper run passes through the shallower ones, and a broader one holds the narrower ones: restarts 0 to b - 1 are
    breadth b, and so are views. Each cell is what `eqr solve` answers with that --depth, --breadth or --views, --select
    and --halt, and the same --turn-every.

    Without --halt nothing counts as settled when an answer is selected: residual takes the lowest score at the depth.
    With it, a trajectory keeps the answer it halted with, and those that have halted go first. (--select first takes
    the fewest steps, but no sibling is cancelled here, so that steps are counted in full.)

    AUROC is how often, of a right and a wrong trajectory, the right one has the lower residual (or score); Spearman's
    rho is the rank correlation of residual (or score) with the share of a trajectory's cells that are right, givens
    included. Both are over all trajectories at a depth; diverged ones rank last; - (null in JSON) where all or none are
    right.

    An answer that fills a puzzle by the rules but is not the file's, whose puzzle then has several, is counted apart:
    it is not exact.

    Where a puzzle's restarts end at the greatest depth and breadth tells its mode, the first of these that holds: no
    correct attractor (none is right); broad (a share of at least --broad has settled and is right); competing (some
    have settled and are wrong); narrow (the others). Settled is a residual of at most --tol at that depth or, with
    --halt, to have halted; without either there are no modes.

    --out keeps what was recorded of each puzzle, and the same command goes on from there; with --engine ray, workers on
    all machines of a Ray cluster record. The report is the same.

    A puzzle without an answer is reported and not counted. Exit code 0: all puzzles were counted; 1: some lines could
    not be; 2: nothing could be done; 130: interrupted, nothing was written (with --out: what was done is kept).
    """
    check_output(output)
    runner = engine_of(engine, address, workers, cpus_per_worker)
    if out is not None:
        check_folder(out)
    if shard_rows is not None and out is None and engine == "local":
        raise ValueError("--shard-rows is for --out and --engine ray; leave it out")
    if views is not None and breadths is not None:
        raise ValueError(f"--views has a trajectory for each view, and --breadths {breadths} was given; leave one out")
    trajectories = parse_counts("--breadths", breadths or "1") if views is None else parse_counts("--views", views)
    sizes = parse_counts("--depths", depths), trajectories
    names = [rule.strip() for rule in select.split(",")]
    if views is not None and "first" in names:
        raise ValueError(
            "--select first runs no view behind the first that settles, and a report counts all; choose residual, "
            "vote, q or any (`eqr solve --views` has first)"
        )
    rules = check_rules(names, halt)
    wanted_tol = parse_tolerance(tol)
    broad = attractors.BROAD if broad is None else broad
    if not 0 < broad <= 1:
        raise ValueError(f"--broad must be a share above 0 and up to 1, got {broad}")
    reasoner = puz.load_model(model, device, progress)
    its_task = puz.task_for(task, reasoner)
    make_views = None
    if views is not None:
        make_views = puz.views_for(its_task, reasoner.config.seq_len, sizes[1][-1], seed, f"--views {views}")
    turns = puz.turns_for(its_task, turn_every, sizes[0][-1], seed)
    reading: dict[str, Any] = dict(format=format, split=split, limit=limit, show=progress)
    puzzles, errors = puz.read_answered(its_task, reasoner.config.seq_len, file, **reading)
    of = len(puzzles)
    puzzles = puz.reveal_clues(its_task, puz.stratified(puzzles, subset), reveal, seed)
    assert puzzles.labels is not None
    run: dict[str, Any] = dict(seed=seed, slots=slots, backend=backend, precision=precision)
    chosen = None
    if _has_tolerance(wanted_tol, card_in(reasoner, precision), halt):
        chosen = settling_tolerance(reasoner, puzzles.inputs, wanted_tol, noise_scale, depth=sizes[0][-1], **run)
    tolerance = None if chosen is None else chosen.value
    settings: dict[str, Any] = dict(halt=halt, tol=tolerance, window=window, noise_scale=noise_scale, **run)
    given = settings if halt in RULES_WITH_TOLERANCE else {**settings, "tol": "auto"}
    others = OtherSolutions(its_task.check, puzzles.inputs)
    traced = halt == "none" and tolerance is not None
    recorded: dict[str, Any] = dict(depths=sizes[0], breadth=sizes[1][-1], trace=traced, **given)
    begun = time.perf_counter()
    if out is None and engine == "local":
        with Bar("evaluating", progress) as bar:
            watch: dict[str, Any] = dict(progress=bar.update, observe=others.observe)
            recording = record(
                reasoner, puzzles.inputs, puzzles.labels, views=make_views, turns=turns, **watch, **recorded
            )
    else:
        job = Recorded(task_spec(task, its_task), recorded, views=views is not None, turn_every=turn_every)
        recording = record_elsewhere(job, runner, reasoner, puzzles, others, out, shard_rows or DEFAULT_ROWS, progress)
    seconds = time.perf_counter() - begun
    grid = correct_grid(recording, *sizes, rules)
    still = None if halt == "none" and tolerance is None else settled(recording, tolerance or 0.0)
    modes: Modes | None = None
    if still is not None:
        last = recording.correct[..., -1], still[..., -1]
        modes = attractors.modes(*last, labelled=recording.labelled, broad=broad)
    report = {
        "command": "eval",
        "model": model,
        "task": its_task.name,
        "settings": {
            "breadth": recording.breadth,
            "select": rules[0],
            **settings,
            **as_settings(chosen),
            "broad": broad,
            "views": views is not None,
            "turn_every": turn_every,
            "device": str(reasoner.device),
            "limit": limit,
            "reveal": reveal,
        },
        "card": card_as_json(reasoner, precision),
        "backend": recording.backend,
        "backend_reason": recording.backend_reason,
        "puzzles": len(puzzles),
        "subset": None if subset is None else {"puzzles": subset, "of": of, "seed": SUBSET_SEED},
        "depths": list(recording.depths),
        "breadths": list(sizes[1]),
        "rules": list(rules),
        **_tables(grid, puzzles),
        "other_valid": [
            {"depth": d, "puzzles": n}
            for d, n in zip(recording.depths, others.counts(recording, rules[0]), strict=True)
        ],
        "grid": _grid(recording, grid, sizes[1], rules),
        "under_tolerance": _under_tolerance(recording, tolerance),
        "coupling": _coupling(recording, still),
        "diagnosis": None if modes is None else _diagnosis(modes, puzzles, settings),
        "seconds": seconds,
        "reproduce": reproduction(ctx, reasoner, puzzles),
        "errors": puz.errors_as_json(errors),
    }
    emit(report, as_json, output)
    if not as_json:
        _draw(grid, puzzles, report, modes)
    return INCOMPLETE if errors else 0


def _has_tolerance(wanted: float | str, card: ModelCard | None, halt: str) -> bool:
    """Whether there is anything to say when a trajectory has settled; a run to the full depth makes nothing up."""
    if halt == "q":
        refuse_tolerance(wanted, halt)
        return False
    return halt in RULES_WITH_TOLERANCE or not isinstance(wanted, str) or card_tolerance(card) is not None


def _groups(grid: Bools, puzzles: PuzzleSet) -> dict[str, dict[str, list[Accuracy]]]:
    """Accuracies by depth at the greatest breadth, by the first rule."""
    correct = grid[:, :, -1, 0]
    # Ratings are on each source's own scale, so bands go from easy to hard, and unknown ones come last.
    by_rating = by_group(correct, rating_bands(puzzles.rating))
    return {
        "accuracy": by_group(correct, ["all"] * len(puzzles)),
        "by_source": by_group(correct, puzzles.source),
        "by_rating": {band: by_rating[band] for band in RATING_BANDS if band in by_rating},
    }


def _tables(grid: Bools, puzzles: PuzzleSet) -> dict[str, Any]:
    tables: dict[str, Any] = {
        table: {name: [a.as_json() for a in row] for name, row in groups.items()}
        for table, groups in _groups(grid, puzzles).items()
    }
    return {**tables, "accuracy": tables["accuracy"]["all"]}


def _cell(grid: Bools, depth: int, breadth: int, rule: int) -> Accuracy:
    """Accuracy in the cell of these indices."""
    return Accuracy.of(grid[:, depth, breadth, rule])


def _grid(recording: Recording, grid: Bools, breadths: Sequence[int], rules: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each depth and breadth, with the mean outer steps that a puzzle costs there (NFE)."""
    return [
        {
            "depth": depth,
            "breadth": breadth,
            "nfe": float(recording.steps[:, :breadth, k].sum(1).mean()),
            "accuracy": {rule: _cell(grid, k, j, r).as_json() for r, rule in enumerate(rules)},
        }
        for k, depth in enumerate(recording.depths)
        for j, breadth in enumerate(breadths)
    ]


def _under_tolerance(recording: Recording, tol: float | None) -> dict[str, Any] | None:
    """Steps to the tolerance (the full depth where it was not met) or to the halt, and who met it or halted."""
    if recording.halt != "none":
        steps, met = recording.steps[..., -1], settled(recording, 0.0)[..., -1]
    elif tol is not None:
        steps, met = first_converged(recording.residuals.reshape(-1, recording.depth), tol)
    else:
        return None
    return {"tol": tol, "mean_steps": float(steps.mean()), "converged": float(met.mean())}


def _coupling(recording: Recording, still: Bools | None) -> list[dict[str, Any]]:
    """Over all trajectories at each depth; settled ones only where it is known which those are."""
    rows, known = [], recording.labelled
    for k, depth in enumerate(recording.depths):
        row = dataclasses.asdict(couple(recording, depth))
        row["settled"] = None if still is None else int(still[known, :, k].sum())
        both = None if still is None else still[known, :, k] & recording.correct[known, :, k]
        row["settled_right"] = None if both is None else int(both.sum())
        rows.append(row)
    return rows


def _diagnosis(modes: Modes, puzzles: PuzzleSet, settings: dict[str, Any]) -> dict[str, Any]:

    none = settings["halt"] == "none"
    counts = [values.tolist() for values in (modes.puzzle, modes.right, modes.settled, modes.settled_right)]
    return {
        "settled_means": "residual <= tol at the greatest depth" if none else f"halted (halt={settings['halt']})",
        "tol": settings["tol"],
        "broad": modes.broad,
        "restarts": modes.restarts,
        "meaning": MODES,
        "counts": modes.counts()["all"],
        "by_source": modes.counts(puzzles.source),
        "per_puzzle": [
            {
                "number": row + 1,
                "line": None if puzzles.line is None else int(puzzles.line[row]),
                "mode": mode,
                "right": right,
                "settled": settled,
                "settled_right": both,
            }
            for (row, right, settled, both), mode in zip(zip(*counts, strict=True), modes.mode, strict=True)
        ],
    }


def _draw(grid: Bools, puzzles: PuzzleSet, report: dict[str, Any], modes: Modes | None) -> None:

    depths, breadths, rules = report["depths"], report["breadths"], report["rules"]
    breadth = "views" if report["settings"]["views"] else "breadth"
    groups, single = _groups(grid, puzzles), len(breadths) == len(rules) == 1
    who = f"{len(puzzles)} of {report['subset']['of']} puzzles" if report["subset"] else f"all {len(puzzles)} puzzles"
    if single:
        drawing.accuracy(who, depths, groups["accuracy"])
    for r, name in enumerate([] if single else rules):
        rows = {f"{breadth} {b}": [_cell(grid, k, j, r) for k in range(len(depths))] for j, b in enumerate(breadths)}
        chosen = "any trajectory right (an oracle)" if name == "any" else f"selected by {name}"
        drawing.accuracy(f"{who}, {chosen}", depths, rows)
    where = "" if single else f", {breadth} {breadths[-1]}, {rules[0]}"
    for title in ("by source", "by rating"):
        rows = groups[title.replace(" ", "_")]
        if len(rows) > 1:
            drawing.accuracy(title + where, depths, rows)
    if any(row["puzzles"] for row in report["other_valid"]):
        shown = ", ".join(f"{row['puzzles']} at depth {row['depth']}" for row in report["other_valid"])
        drawing.lines(f"another valid solution than the file's, not counted as exact: {shown}")
    drawing.coupling(report["coupling"])
    under, halt = report["under_tolerance"], report["settings"]["halt"]
    if under is None:
        drawing.lines(
            "no --tol, and the model's card has no calibrated tolerance, so nothing counts as settled and there are no "
            "modes; `eqr calibrate` finds one"
        )
    else:
        name = f"under the tolerance {under['tol']:.3g}" if halt == "none" else f"halting by {halt}"
        drawing.lines(
            f"{name}: mean steps {under['mean_steps']:.1f} of {depths[-1]}, "
            f"{'met' if halt == 'none' else 'halted'} by {100 * under['converged']:.1f} % of the trajectories"
        )
    if modes is not None and modes.restarts > 1:
        counts, kind = modes.counts(puzzles.source), "views" if report["settings"]["views"] else "restarts"
        title = f"modes of {modes.restarts} {kind} at depth {depths[-1]}"
        drawing.modes(title, {"all": modes.counts()["all"], **(counts if len(counts) > 1 else {})}, modes.broad)
