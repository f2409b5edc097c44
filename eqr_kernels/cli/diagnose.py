"""`eqr diagnose`."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import INCOMPLETE, Bar, check_output, command, emit
from eqr_kernels.cli.provenance import reproduction
from eqr_kernels.cli.render.diagnose_terminal import draw_diagnosis
from eqr_kernels.cli.tolerance import as_settings, card_as_json, parse_tolerance, settling_tolerance
from eqr_kernels.solver import DEFAULT_DEPTH
from eqr_kernels.studies.advice import advise
from eqr_kernels.studies.attractors import BROAD, MODES
from eqr_kernels.studies.dynamics import KINDS
from eqr_kernels.studies.recording import record
from eqr_kernels.studies.scaling import Scaling, recorded_depths, summarise
from eqr_kernels.studies.statistics import Paired
from eqr_kernels.studies.subset import SUBSET_SEED
from eqr_kernels.tasks.common import PuzzleSet


@command
def diagnose(
    ctx: typer.Context,
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    depth: Annotated[int, typer.Option(min=1, help="Outer steps, for every trajectory.")] = DEFAULT_DEPTH,
    breadth: Annotated[int, typer.Option(min=1, help="Trajectories of each puzzle, from other random starts.")] = 8,
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
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Tell why more depth or breadth does not help, or that it does, from one run without halting.

    Every trajectory runs to the full depth. Told are how fast trajectories settle and what the others do instead, what
    depth and breadth gain (paired, with McNemar's exact test), whether restarts agree, the mode of each puzzle, how
    well the residual tells right from wrong, and findings with their evidence and advice.

    The contraction rate is by what factor a step shrinks the motion while a trajectory comes to rest: the median over
    trajectories of the slope of log sqrt(residual^2 - floor^2) over steps, exponentiated, as noise adds in quadrature.
    Findings need 20 puzzles, and count puzzles, not trajectories: shares by their 95 % intervals.

    Exit code 0: all puzzles were counted; 1: some lines could not be; 2: nothing could be done; 130: interrupted,
    nothing was written.
    """
    check_output(output)
    wanted_tol = parse_tolerance(tol)
    broad = BROAD if broad is None else broad
    if not 0 < broad <= 1:
        raise ValueError(f"--broad must be a share above 0 and up to 1, got {broad}")
    reasoner = puz.load_model(model, device, progress)
    its_task = puz.task_for(task, reasoner)
    if noise_scale is None:
        noise_scale = reasoner.inference_noise_scale
    reading: dict[str, Any] = dict(format=format, split=split, limit=limit, show=progress)
    puzzles, errors = puz.read_answered(its_task, reasoner.config.seq_len, file, **reading)
    of = len(puzzles)
    puzzles = puz.reveal_clues(its_task, puz.stratified(puzzles, subset), reveal, seed)
    assert puzzles.labels is not None
    options: dict[str, Any] = dict(
        window=window,
        noise_scale=noise_scale,
        seed=seed,
        slots=slots,
        backend=backend,
        precision=precision,
    )
    run = {name: options[name] for name in ("seed", "slots", "backend", "precision")}
    chosen = settling_tolerance(reasoner, puzzles.inputs, wanted_tol, noise_scale, depth=depth, **run)
    tolerance = chosen.value
    begun = time.perf_counter()
    with Bar("running the full depth", progress) as bar:
        recording = record(
            reasoner,
            puzzles.inputs,
            puzzles.labels,
            depths=recorded_depths(depth),
            breadth=breadth,
            progress=bar.update,
            **options,
        )
    seconds = time.perf_counter() - begun
    scaling = summarise(recording, tol=tolerance, noise_scale=noise_scale, broad=broad)
    report: dict[str, Any] = {
        "command": "diagnose",
        "model": model,
        "task": its_task.name,
        "settings": {
            "depth": depth,
            "breadth": breadth,
            **as_settings(chosen),
            **options,
            "broad": broad,
            "device": str(reasoner.device),
            "limit": limit,
            "reveal": reveal,
        },
        "card": card_as_json(reasoner, precision),
        "backend": recording.backend,
        "backend_reason": recording.backend_reason,
        "puzzles": len(puzzles),
        "subset": None if subset is None else {"puzzles": subset, "of": of, "seed": SUBSET_SEED},
        **_as_json(scaling, puzzles),
        "findings": [dataclasses.asdict(finding) for finding in advise(scaling, tol=tolerance)],
        "seconds": seconds,
        "reproduce": reproduction(ctx, reasoner, puzzles),
        "errors": puz.errors_as_json(errors),
    }
    emit(report, as_json, output)
    if not as_json:
        draw_diagnosis(report, scaling, puzzles.source)
    return INCOMPLETE if errors else 0


def _as_json(scaling: Scaling, puzzles: PuzzleSet) -> dict[str, Any]:

    agreement, modes = scaling.agreement, scaling.modes
    counts = [values.tolist() for values in (modes.right, modes.settled, modes.settled_right)]
    return {
        "convergence": {**dataclasses.asdict(scaling.convergence), "steps": _steps(scaling)},
        "residual_by_depth": [dataclasses.asdict(row) for row in scaling.trends],
        "kinds": {"meaning": KINDS, "counts": scaling.kinds, "periods": scaling.periods},
        "accuracy": [
            {
                "depth": depth,
                "breadth": breadth,
                "accuracy": {rule: scaling.accuracy(rule, k, j).as_json() for rule in scaling.correct},
            }
            for k, depth in enumerate(scaling.depths)
            for j, breadth in enumerate(sorted({1, scaling.restarts}))
        ],
        "depth_gain": None if scaling.by_depth is None else _paired(scaling.by_depth),
        "breadth_gain": _paired(scaling.by_breadth),
        "rule_gain": {rule: _paired(row) for rule, row in scaling.by_rule.items()},
        "oracle_gain": _paired(scaling.oracle),
        "agreement": {
            **dataclasses.asdict(agreement),
            "share": agreement.share,
            "settled_share": agreement.settled_share,
            "distinct": scaling.distinct_answers(),
        },
        "modes": {
            "meaning": MODES,
            "broad": modes.broad,
            "restarts": modes.restarts,
            "counts": modes.counts().get("all", {}),
            "by_source": modes.counts(puzzles.source),
            "per_puzzle": [
                {
                    "number": row + 1,
                    "line": None if puzzles.line is None else int(puzzles.line[row]),
                    "mode": mode,
                    "right": right,
                    "settled": settled,
                    "settled_right": both,
                    "distinct": int(agreement.distinct[row]),
                }
                for row, mode, right, settled, both in zip(modes.puzzle.tolist(), modes.mode, *counts, strict=True)
            ],
        },
        "coupling": dataclasses.asdict(scaling.coupling),
    }


def _steps(scaling: Scaling) -> dict[str, float]:
    return dict(zip(("p50", "p95"), scaling.convergence.steps, strict=True))


def _paired(by: Paired) -> dict[str, Any]:
    return {**dataclasses.asdict(by), "net": by.net, "mcnemar_p": by.p}
