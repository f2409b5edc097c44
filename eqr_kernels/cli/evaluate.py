"""`eqr eval`."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import INCOMPLETE, Bar, check_output, command, emit, parse_counts, parse_tolerance

if TYPE_CHECKING:
    from eqr_kernels.checkpoint import ModelCard
    from eqr_kernels.studies import Accuracy, Diagnosis, Evaluation
    from eqr_kernels.tasks.common import PuzzleSet


@command
def evaluate(
    ctx: typer.Context,
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    depths: Annotated[str, typer.Option(help="Outer steps after which answers are counted.")] = "1,2,4,8,16,32,64",
    breadths: Annotated[
        str, typer.Option("--breadths", "--breadth", help="Trajectories of each puzzle, as in 1,8,32.")
    ] = "1",
    select: Annotated[
        str,
        typer.Option(
            help="Which trajectory answers: residual, vote, q, first (with --halt) or any (right if any trajectory is: "
            "an oracle); several, as in residual,vote,q,any. Tables by source and rating are for the first."
        ),
    ] = "residual",
    halt: Annotated[
        str, typer.Option(help="none (all run to the full depth), residual (settled trajectories stop) or q.")
    ] = "none",
    tol: Annotated[str, typer.Option(help="Residual that counts as settled; auto takes the card's, if any.")] = "auto",
    broad: Annotated[
        float | None,
        typer.Option(
            help="Share of restarts settled on the right answer that makes a broad basin.", show_default="0.95"
        ),
    ] = None,
    window: opt.Window = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    limit: opt.Limit = None,
    subset: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many puzzles, always the same, with the whole's mix of sources and ratings."),
    ] = None,
    reveal: opt.Reveal = None,
    format: opt.Format = "auto",
    split: opt.Split = None,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Measure exact accuracy by depth and breadth, all from one run of the greatest depth and breadth.

    A deeper run passes through the shallower ones, and a broader one holds the narrower ones: restarts 0 to b - 1 are
    breadth b. Each cell is what `eqr solve` answers with that --depth, --breadth, --select and --halt.

    Without --halt nothing counts as settled when an answer is selected: residual takes the lowest score at the depth.
    With it, a trajectory keeps the answer it halted with, and those that have halted go first. (--select first takes
    the fewest steps, but no sibling is cancelled here, so that steps are counted in full.)

    AUROC is how often, of a right and a wrong trajectory, the right one has the lower residual (or score); Spearman's
    rho is the rank correlation of residual (or score) with the share of a trajectory's cells that are right, givens
    included. Both are over all trajectories at a depth; diverged ones rank last; - (null in JSON) where all or none are
    right.

    Where a puzzle's restarts end at the greatest depth and breadth tells its mode, the first of these that holds: no
    correct attractor (none is right); broad (a share of at least --broad has settled and is right); competing (some
    have settled and are wrong); narrow (the others). Settled is a residual of at most --tol at that depth or, with
    --halt, to have halted; without either there are no modes.

    A puzzle without an answer is reported and not counted. Exit code 0: all puzzles were counted; 1: some lines could
    not be; 2: nothing could be done; 130: interrupted, nothing was written.
    """
    from eqr_kernels import studies as evaluation
    from eqr_kernels.cli import puzzles as puz
    from eqr_kernels.cli.provenance import reproduction

    check_output(output)
    asked = parse_counts("--depths", depths), parse_counts("--breadths", breadths)
    rules = tuple(dict.fromkeys(rule.strip() for rule in select.split(",")))
    wanted_tol = parse_tolerance(tol)
    broad = evaluation.BROAD if broad is None else broad
    if not 0 < broad <= 1:
        raise ValueError(f"--broad must be a share above 0 and up to 1, got {broad}")
    reasoner = puz.load_model(model, device, progress)
    task, card = puz.task_of(reasoner.config), reasoner.card
    reading: dict[str, Any] = dict(format=format, split=split, limit=limit, show=progress)
    puzzles, errors = puz.read_answered(task, reasoner.config.seq_len, file, **reading)
    of = len(puzzles)
    puzzles = puz.reveal_clues(task, puz.stratified(puzzles, subset), reveal, seed)
    assert puzzles.labels is not None
    settings: dict[str, Any] = dict(
        halt=halt,
        tol=_tolerance(wanted_tol, card, halt),
        window=window,
        noise_scale=noise_scale,
        seed=seed,
        slots=slots,
        backend=backend,
        precision=precision,
    )
    begun = time.perf_counter()
    with Bar("evaluating", progress) as bar:
        found = evaluation.evaluate(
            reasoner,
            puzzles.inputs,
            puzzles.labels,
            depths=asked[0],
            breadth=asked[1],
            select=rules,
            progress=bar.update,
            **settings,
        )
    seconds = time.perf_counter() - begun
    modes: Diagnosis | None = None
    if found.all_settled is not None:
        last = found.all_exact[:, -1], found.all_settled[:, -1]
        modes = evaluation.diagnose(*last, labelled=found.labelled, broad=broad)
    report = {
        "command": "eval",
        "model": model,
        "task": task.name,
        "settings": {
            "breadth": found.breadths[-1],
            "select": rules[0],
            **settings,
            "broad": broad,
            "device": str(reasoner.device),
            "limit": limit,
            "reveal": reveal,
        },
        "card": None if card is None else {name: getattr(card, name) for name in ("tol", "noise_scale", "window")},
        "backend": found.backend,
        "backend_reason": found.backend_reason,
        "puzzles": len(puzzles),
        "subset": None if subset is None else {"puzzles": subset, "of": of, "seed": evaluation.SUBSET_SEED},
        "depths": list(found.depths),
        "breadths": list(found.breadths),
        "rules": list(found.rules),
        **_tables(found, puzzles),
        "grid": _grid(found),
        "under_tolerance": _under_tolerance(found, settings["tol"]),
        "coupling": _coupling(found),
        "diagnosis": None if modes is None else _diagnosis(modes, puzzles, settings),
        "seconds": seconds,
        "reproduce": reproduction(ctx, reasoner, puzzles),
        "errors": puz.errors_as_json(errors),
    }
    emit(report, as_json, output)
    if not as_json:
        _draw(found, puzzles, report, modes)
    return INCOMPLETE if errors else 0


def _tolerance(wanted: float | str, card: ModelCard | None, halt: str) -> float | None:
    """What counts as settled; None where nothing says."""
    if isinstance(wanted, str):
        return None if card is None or halt == "q" else card.tol
    return wanted


def _groups(found: Evaluation, puzzles: PuzzleSet) -> dict[str, dict[str, list[Accuracy]]]:
    """Accuracies by depth at the greatest breadth, by the first rule."""
    from eqr_kernels import studies as evaluation

    # Ratings are on each source's own scale, so bands go from easy to hard, and unknown ones come last.
    by_rating = evaluation.by_group(found.exact, evaluation.rating_bands(puzzles.rating))
    return {
        "accuracy": evaluation.by_group(found.exact, ["all"] * len(puzzles)),
        "by_source": evaluation.by_group(found.exact, puzzles.source),
        "by_rating": {band: by_rating[band] for band in evaluation.RATING_BANDS if band in by_rating},
    }


def _tables(found: Evaluation, puzzles: PuzzleSet) -> dict[str, Any]:
    told: dict[str, Any] = {
        table: {name: [a.as_json() for a in row] for name, row in groups.items()}
        for table, groups in _groups(found, puzzles).items()
    }
    return {**told, "accuracy": told["accuracy"]["all"]}


def _cell(found: Evaluation, depth: int, breadth: int, rule: int) -> Accuracy:
    """Accuracy in the cell of these indices."""
    from eqr_kernels.studies import Accuracy

    right = found.grid[:, depth, breadth, rule]
    return Accuracy(int(right.sum()), len(right))


def _grid(found: Evaluation) -> list[dict[str, Any]]:
    """A row for each depth and breadth, with the mean outer steps that a puzzle costs there (NFE)."""
    return [
        {
            "depth": depth,
            "breadth": breadth,
            "nfe": float(found.all_steps[:, k, :breadth].sum(1).mean()),
            "accuracy": {rule: _cell(found, k, j, r).as_json() for r, rule in enumerate(found.rules)},
        }
        for k, depth in enumerate(found.depths)
        for j, breadth in enumerate(found.breadths)
    ]


def _under_tolerance(found: Evaluation, tol: float | None) -> dict[str, Any] | None:
    if found.steps is None or found.converged is None:
        return None
    return {"tol": tol, "mean_steps": float(found.steps.mean()), "converged": float(found.converged.mean())}


def _coupling(found: Evaluation) -> list[dict[str, Any]]:
    """Over all trajectories at each depth; settled ones only where it is known which those are."""
    from eqr_kernels.studies import couple

    rows = []
    for k, depth in enumerate(found.depths):
        fields = (found.all_exact, found.all_accuracy, found.all_residual, found.all_score, found.all_diverged)
        row = dataclasses.asdict(couple(depth, *(field[:, k] for field in fields)))
        settled = None if found.all_settled is None else found.all_settled[found.labelled, k]
        right = found.all_exact[found.labelled, k]
        row["settled"] = None if settled is None else int(settled.sum())
        row["settled_right"] = None if settled is None else int((settled & right).sum())
        rows.append(row)
    return rows


def _diagnosis(modes: Diagnosis, puzzles: PuzzleSet, settings: dict[str, Any]) -> dict[str, Any]:
    from eqr_kernels.studies import MODES

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


def _draw(found: Evaluation, puzzles: PuzzleSet, report: dict[str, Any], modes: Diagnosis | None) -> None:
    from eqr_kernels.cli.render import terminal as drawing

    n, breadth, rule = len(puzzles), found.breadths[-1], found.rules[0]
    groups, single = _groups(found, puzzles), len(found.breadths) == len(found.rules) == 1
    who = f"{n} of {report['subset']['of']} puzzles" if report["subset"] else f"all {n} puzzles"
    if single:
        drawing.accuracy(who, found.depths, groups["accuracy"])
    for r, name in enumerate([] if single else found.rules):
        rows = {
            f"breadth {b}": [_cell(found, k, j, r) for k in range(len(found.depths))]
            for j, b in enumerate(found.breadths)
        }
        chosen = "any trajectory right (an oracle)" if name == "any" else f"selected by {name}"
        drawing.accuracy(f"{who}, {chosen}", found.depths, rows)
    where = "" if single else f", breadth {breadth}, {rule}"
    for title in ("by source", "by rating"):
        rows = groups[title.replace(" ", "_")]
        if len(rows) > 1:
            drawing.accuracy(title + where, found.depths, rows)
    drawing.coupling(report["coupling"])
    told, settings = report["under_tolerance"], report["settings"]
    if told and settings["halt"] == "none":
        drawing.lines(
            f"under the tolerance {told['tol']:.3g}: mean steps {told['mean_steps']:.1f} of {found.depths[-1]}, "
            f"settled {100 * told['converged']:.1f} % of the trajectories"
        )
    elif told:
        drawing.lines(
            f"halting by {settings['halt']}: mean steps {told['mean_steps']:.1f} of {found.depths[-1]}, halted "
            f"{100 * told['converged']:.1f} % of the trajectories"
        )
    else:
        drawing.lines(
            "no --tol, and the model's card has no calibrated tolerance, so nothing counts as settled and there are no "
            "modes; `eqr calibrate` finds one"
        )
    if modes is not None and modes.restarts > 1:
        counts = modes.counts(puzzles.source)
        title = f"modes of {modes.restarts} restarts at depth {found.depths[-1]}"
        drawing.modes(title, {"all": modes.counts()["all"], **(counts if len(counts) > 1 else {})}, modes.broad)
