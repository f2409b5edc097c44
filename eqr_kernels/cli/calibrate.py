"""`eqr calibrate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from eqr_kernels import studies
from eqr_kernels.checkpoint import MODEL_FILE
from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli.console import INCOMPLETE, Bar, check_output, command, complain, emit, parse_numbers
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.render.wording import interval, percent
from eqr_kernels.noise import noise_floor
from eqr_kernels.solver import DEFAULT_DEPTH
from eqr_kernels.studies.noise_choice import NoiseChoice
from eqr_kernels.studies.statistics import Paired
from eqr_kernels.studies.subset import SUBSET_SEED
from eqr_kernels.studies.tolerance import Calibration, Tolerance
from eqr_kernels.studies.tolerance_card import check_noise, store_tolerance

_SHOWN = 24
_SELECT = "residual"
"""How the answers are selected by which noise is compared."""


@command
def calibrate(
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    depth: opt.Depth = DEFAULT_DEPTH,
    max_loss: Annotated[
        float, typer.Option(help="Share of the puzzles that halting may lose; 0.01 is one in 100.")
    ] = 0.0,
    trust: Annotated[
        float, typer.Option(help="Least share of the puzzles that meet tol that must be right.")
    ] = studies.TRUST,
    patience: Annotated[int, typer.Option(help="Consecutive steps at or below the tolerance.")] = 1,
    noise_scale: opt.NoiseScale = None,
    noise_scales: Annotated[
        str | None,
        typer.Option(
            help="Noise to choose from before tolerances are looked for, as in 0,0.01,0.1; the trained one and the "
            "card's are always among them."
        ),
    ] = None,
    breadth: Annotated[
        int,
        typer.Option(
            min=1,
            help="Trajectories of each puzzle, selected by residual, by which --noise-scales are compared; the time is "
            "so many times that of one, for each noise.",
        ),
    ] = 1,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    subset: opt.Stratified = 1000,
    reveal: opt.Reveal = None,
    format: opt.Format = "auto",
    split: opt.Split = None,
    write: Annotated[
        bool, typer.Option("--write", help="Store them, or that there is none, in the model's card.")
    ] = False,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Find two residual tolerances: tol, at which converged is a promise, and tol_fast, which costs no accuracy.

    tol is the loosest at which 99 % (--trust) of the puzzles that met it were right, and no fewer answers were right
    than at the full depth; it takes 100 puzzles that met it to tell. tol_fast is the loosest with which no fewer were,
    whatever else met it. solve takes them as --tol auto and --tol fast. Neither may be one that half of the puzzles
    meet at their first step, nor 1 or more. One run of the full depth tells, for every tolerance, where each puzzle
    would have stopped and what it would have answered. With noise, tolerances below sqrt(2) times --noise-scale are
    never met and not tried.

    --noise-scales calibrates the noise first. Each is run like that, with --breadth trajectories, and another than the
    trained noise is chosen only if it answers more puzzles than chance explains (McNemar's exact test at 5 % for all
    that are compared), and no fewer with one trajectory. The tolerances are then those of the chosen noise. --write
    stores both; accuracies that the card has of another noise are dropped.

    A model that settles on wrong answers as deeply as on right ones has no tol: the card then says so, and so do the
    commands. Calibrate on puzzles like those that will be solved: a tolerance found with clues shown (--reveal) holds
    for such puzzles only. Where few are solved, take more of them with --subset.

    Exit code 0: tol_fast was found, and tol or the reason why there is none; 1: the same, but some lines could not be
    used; 2: no tolerance was found, or nothing could be done; 130: interrupted, nothing was written.
    """
    check_output(output)
    if write and patience != 1:
        raise ValueError(
            f"--write stores a tolerance for the default rule, patience 1, and --patience is {patience}; a tolerance "
            "found for a greater patience is too loose for it: pass it to solve with its patience instead"
        )
    if write and trust < studies.TRUST:
        raise ValueError(
            f"--write stores a promise that {100 * studies.TRUST:g} % are right, and --trust is {trust:g}; leave one "
            "out, and pass a tolerance that was found with less to solve by its number"
        )
    if noise_scales is None and breadth != 1:
        raise ValueError(
            f"--breadth is for the comparison of --noise-scales, and tolerances are those of one trajectory; got "
            f"{breadth} without --noise-scales: give these as well, or leave it out"
        )
    if None not in (noise_scale, noise_scales):
        raise ValueError(
            f"--noise-scale sets the noise that --noise-scales would choose, got {noise_scale:g} and {noise_scales!r}; "
            "give one of the two"
        )
    studies.check_shares(max_loss=max_loss, trust=trust)
    compared = () if noise_scales is None else parse_numbers("--noise-scales", noise_scales, zero=True)
    weights = _writable(model) if write else None
    reasoner = puz.load_model(model, device, progress)
    its_task = puz.task_for(task, reasoner)
    reading: dict[str, Any] = dict(format=format, split=split, show=progress)
    puzzles, errors = puz.read_answered(its_task, reasoner.config.seq_len, file, **reading)
    of = len(puzzles)
    puzzles = puz.reveal_clues(its_task, puz.stratified(puzzles, min(subset, of)), reveal, seed)
    assert puzzles.labels is not None
    trained, usual = reasoner.config.noise_scale, reasoner.inference_noise_scale
    scales = sorted({trained, usual, *compared}) if compared else [usual if noise_scale is None else noise_scale]
    run: dict[str, Any] = dict(seed=seed, slots=slots, backend=backend, precision=precision)
    for scale in scales if write else ():
        check_noise(reasoner.card, precision, scale)
    depths = studies.recordable_depths(reasoner, depth, backend=backend, precision=precision)
    firsts, runs = {}, {}
    for scale in scales:
        with Bar(f"running the full depth with noise {scale:g}", progress) as bar:
            recording = studies.record(
                reasoner,
                puzzles.inputs,
                puzzles.labels,
                depths=depths,
                breadth=breadth,
                noise_scale=scale,
                progress=bar.update,
                **run,
            )
        firsts[scale], runs[scale] = recording.narrowed(1), studies.NoiseRun.of(recording, _SELECT)
    choice = studies.choose_noise(runs, trained) if compared else None
    if choice is not None and not as_json:
        # Told before tolerances are looked for, of which there may be none.
        drawing.noise_choice(choice, breadth)
    noise_scale = scales[0] if choice is None else choice.chosen
    recording, settings = firsts[noise_scale], {"noise_scale": noise_scale, **run}
    noise = None if choice is None else _noise_as_json(choice, breadth)
    try:
        calibration = studies.calibrate(
            recording, max_loss=max_loss, trust=trust, patience=patience, floor=noise_floor(noise_scale)
        )
    except ValueError as error:
        if noise is not None:
            emit({"command": "calibrate", "model": model, "noise": noise, "error": str(error)}, as_json, output)
        raise
    trusted, fast = calibration.trusted, calibration.fast
    report: dict[str, Any] = {
        "command": "calibrate",
        "model": model,
        "settings": {
            **settings,
            "depth": depth,
            "max_loss": max_loss,
            "trust": trust,
            "patience": patience,
            "recorded_depths": None if recording.every_step else list(depths),
            "device": str(reasoner.device),
            "reveal": reveal,
        },
        "backend": recording.backend,
        "puzzles": calibration.puzzles,
        "subset": {"puzzles": calibration.puzzles, "of": of, "seed": SUBSET_SEED},
        "correct_at_full_depth": calibration.correct,
        "noise": noise,
        "candidates": [_as_json(candidate) for candidate in calibration.candidates],
        "tol": None if trusted is None else _as_json(trusted),
        "tol_fast": None if fast is None else _as_json(fast),
        "tol_missing": calibration.missing or None,
        "written": None,
        "errors": puz.errors_as_json(errors),
    }
    if weights is not None:
        name = Path(str(file)).name
        report["written"] = str(store_tolerance(weights, calibration, report["settings"], name, noise))
    emit(report, as_json, output)
    if not as_json:
        drawing.tolerances(_condensed(calibration), calibration.puzzles, trusted, fast)
        n = calibration.puzzles
        drawing.lines(
            f"{n} of {of} puzzles; at the full depth {depth} {percent(calibration.correct / n)} of them right",
            *(
                f"{name} {t.tol:g}: {t.right_when_converged} of the {t.converged} that settled are right "
                f"(95 %: {interval(t.interval)}); of all, {percent(t.correct / n)} after a mean of {t.mean_steps:.1f} "
                "steps"
                for name, t in (("tol", trusted), ("tol_fast", fast))
                if t is not None
            ),
            f"written to {report['written']}" if write else "not stored; --write stores it in the model's card",
        )
    if fast is None:
        # Told before failing: which tolerance loses how much is what a choice of --max-loss needs.
        raise ValueError(
            f"{calibration.missing}; train longer, calibrate on other puzzles, allow a loss with --max-loss, or lower "
            f"{'--noise-scale' if choice is None else '--noise-scales'}"
        )
    if trusted is None:
        complain(f"converged is no promise for this model: {calibration.missing}", "warning")
    return INCOMPLETE if errors else 0


def _noise_as_json(choice: NoiseChoice, breadth: int) -> dict[str, Any]:
    """What the report and the card say of it."""

    def against(by: Paired) -> dict[str, Any]:
        return {"gained": by.gained, "lost": by.lost, "mcnemar_p": by.p}

    trials = [
        {
            **{name: getattr(t, name) for name in ("noise_scale", "selected", "any", "first", "single")},
            "selected_against_trained": against(t.by_selected),
            "first_against_trained": against(t.by_first),
        }
        for t in choice.trials
    ]
    return {
        "trained": choice.trained,
        "chosen": choice.chosen,
        "breadth": breadth,
        "select": _SELECT,
        "puzzles": choice.trials[0].by_first.puzzles,
        "trials": trials,
    }


def _writable(model: str) -> Path:
    """The safetensors file whose card is to be written."""
    path = Path(model).expanduser()
    path = path / MODEL_FILE if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"--write needs --model to be the path of a .safetensors file or of a folder with {MODEL_FILE}, got "
            f"{model!r}; save the model with save_pretrained first"
        )
    return path


def _as_json(t: Tolerance) -> dict[str, Any]:
    return {**dataclasses.asdict(t), "wilson95": list(t.interval)}


def _condensed(calibration: Calibration) -> list[Tolerance]:
    """Some two dozen of the candidates that some puzzle meets, the chosen ones among them."""
    candidates = calibration.candidates
    met = [t for t in candidates if t.converged] or list(candidates)
    every = max(1, len(met) // _SHOWN)
    chosen = calibration.trusted, calibration.fast
    return [t for i, t in enumerate(met) if i % every == 0 or t in chosen or i == len(met) - 1]
