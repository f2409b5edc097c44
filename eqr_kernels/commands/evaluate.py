"""`eqr eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from eqr_kernels.commands import options as opt
from eqr_kernels.commands.console import INCOMPLETE, Bar, check_output, command, emit, parse_counts

if TYPE_CHECKING:
    from eqr_kernels.evaluation import Accuracy


@command
def evaluate(
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    depths: Annotated[str, typer.Option(help="Outer steps after which answers are counted.")] = "1,2,4,8,16,32,64",
    breadth: opt.Breadth = 1,
    select: opt.Select = "residual",
    window: opt.Window = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    limit: opt.Limit = None,
    reveal: opt.Reveal = None,
    format: opt.Format = "auto",
    split: opt.Split = None,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Measure exact accuracy by depth, from one run of the full depth without halting.

    A puzzle without an answer is reported and not counted. Exit code 0: all puzzles were counted; 1: some lines could
    not be; 2: nothing could be done; 130: interrupted, nothing was written.
    """
    from eqr_kernels import evaluation
    from eqr_kernels.commands import drawing
    from eqr_kernels.commands import puzzles as puz

    check_output(output)
    counted = parse_counts("--depths", depths)
    reasoner = puz.load_model(model, device, progress)
    task = puz.task_of(reasoner.config)
    read = puz.read_puzzles(task, reasoner.config.seq_len, file, format=format, split=split, limit=limit, show=progress)
    puzzles, errors = puz.with_answers(*read, task)
    puz.report_errors(errors)
    puzzles = puz.reveal_clues(task, puzzles, reveal, seed)
    assert puzzles.labels is not None
    tol = None if reasoner.card is None else reasoner.card.tol
    settings: dict[str, Any] = dict(
        breadth=breadth, select=select, window=window, noise_scale=noise_scale, seed=seed, slots=slots, backend=backend,
        precision=precision,
    )  # fmt: skip
    with Bar("evaluating", progress) as bar:
        found = evaluation.evaluate(
            reasoner, puzzles.inputs, puzzles.labels, depths=counted, tol=tol, progress=bar.update, **settings
        )
    overall = evaluation.by_group(found.exact, ["all"] * len(puzzles))
    by_source = evaluation.by_group(found.exact, puzzles.source)
    # Ratings are on each source's own scale, so bands go from easy to hard, and unknown ones come last.
    bands = evaluation.rating_bands(puzzles.rating)
    by_rating = evaluation.by_group(found.exact, bands)
    by_rating = {band: by_rating[band] for band in evaluation.RATING_BANDS if band in by_rating}
    settled: dict[str, Any] | None = None
    if found.steps is not None and found.converged is not None:
        settled = {"tol": tol, "mean_steps": float(found.steps.mean()), "converged": float(found.converged.mean())}
    report = {
        "command": "eval",
        "model": model,
        "task": task.name,
        "settings": {**settings, "device": str(reasoner.device), "reveal": reveal},
        "backend": found.backend,
        "backend_reason": found.backend_reason,
        "puzzles": len(puzzles),
        "depths": list(counted),
        "accuracy": _as_json(overall)["all"],
        "by_source": _as_json(by_source),
        "by_rating": _as_json(by_rating),
        "under_tolerance": settled,
        "errors": puz.errors_as_json(errors),
    }
    emit(report, as_json, output)
    if not as_json:
        drawing.accuracy(f"all {len(puzzles)} puzzles", counted, overall)
        if len(by_source) > 1:
            drawing.accuracy("by source", counted, by_source)
        if len(by_rating) > 1:
            drawing.accuracy("by rating", counted, by_rating)
        if settled:
            drawing.lines(
                f"under the calibrated tolerance {settled['tol']:.3g}: mean steps {settled['mean_steps']:.1f} of "
                f"{counted[-1]}, settled {100 * settled['converged']:.1f} % of the trajectories"
            )
        else:
            drawing.lines("the model's card has no calibrated tolerance; `eqr calibrate` finds one")
    return INCOMPLETE if errors else 0


def _as_json(groups: dict[str, list[Accuracy]]) -> dict[str, list[dict[str, Any]]]:
    def one(a: Accuracy) -> dict[str, Any]:
        return {"correct": a.correct, "total": a.total, "share": a.share, "wilson95": list(a.interval)}

    return {name: [one(a) for a in accuracies] for name, accuracies in groups.items()}
