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
from eqr_kernels.cli.console import INCOMPLETE, Bar, check_output, command, emit
from eqr_kernels.cli.render import terminal as drawing
from eqr_kernels.cli.render.wording import percent
from eqr_kernels.noise import noise_floor
from eqr_kernels.solver import DEFAULT_DEPTH
from eqr_kernels.studies.tolerance_card import store_tolerance

_SHOWN = 24


@command
def calibrate(
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    depth: opt.Depth = DEFAULT_DEPTH,
    max_loss: Annotated[
        float, typer.Option(help="Share of the puzzles that halting may lose; 0.01 is one in 100.")
    ] = 0.0,
    trust: Annotated[float, typer.Option(help="Least share of the settled puzzles that must be right.")] = 0.0,
    patience: Annotated[int, typer.Option(help="Consecutive steps at or below the tolerance.")] = 1,
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
    write: Annotated[bool, typer.Option("--write", help="Store it in the model's card.")] = False,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
    progress: opt.ShowProgress = None,
) -> int:
    """Find the loosest residual tolerance that costs no accuracy against the full depth.

    One run of the full depth tells, for every tolerance, where each puzzle would have stopped and what it would have
    answered. With noise, tolerances below sqrt(2) times --noise-scale are never met and not tried. Exit code 0: found;
    1: found, but some lines could not be used; 2: nothing could be done; 130: interrupted, nothing was written.
    """
    check_output(output)
    if write and patience != 1:
        raise ValueError(
            f"--write stores a tolerance for the default rule, patience 1, and --patience is {patience}; a tolerance "
            "found for a greater patience is too loose for it: pass it to solve with its patience instead"
        )
    weights = _writable(model) if write else None
    reasoner = puz.load_model(model, device, progress)
    task = puz.task_of(reasoner.config)
    reading: dict[str, Any] = dict(format=format, split=split, limit=limit, show=progress)
    puzzles, errors = puz.read_answered(task, reasoner.config.seq_len, file, **reading)
    puzzles = puz.reveal_clues(task, puzzles, reveal, seed)
    assert puzzles.labels is not None
    if noise_scale is None:
        noise_scale = reasoner.inference_noise_scale
    settings: dict[str, Any] = dict(
        noise_scale=noise_scale, seed=seed, slots=slots, backend=backend, precision=precision
    )
    with Bar("running the full depth", progress) as bar:
        depths = studies.recordable_depths(reasoner, depth, backend=backend, precision=precision)
        recording = studies.record(
            reasoner, puzzles.inputs, puzzles.labels, depths=depths, progress=bar.update, **settings
        )
    calibration = studies.calibrate(
        recording, max_loss=max_loss, trust=trust, patience=patience, floor=noise_floor(noise_scale)
    )
    candidates = [dataclasses.asdict(candidate) for candidate in calibration.candidates]
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
        "correct_at_full_depth": calibration.correct,
        "candidates": candidates,
        "chosen": None if calibration.chosen is None else dataclasses.asdict(calibration.chosen),
        "written": None,
        "errors": puz.errors_as_json(errors),
    }
    if calibration.chosen is None:
        # Told before failing: which tolerance loses how much is what a choice of --max-loss needs.
        emit(report, as_json, output)
        if not as_json:
            drawing.tolerances(_condensed(candidates, None), calibration.puzzles, None)
        raise ValueError(
            f"no tolerance that some puzzle meets keeps the {calibration.correct} right answers of depth {depth}; "
            "allow a loss with --max-loss, ask for less --trust, or lower --noise-scale"
        )
    if weights is not None:
        report["written"] = str(store_tolerance(weights, calibration, report["settings"], Path(str(file)).name))
    emit(report, as_json, output)
    if not as_json:
        chosen, n = calibration.chosen, calibration.puzzles
        drawing.tolerances(_condensed(candidates, chosen.tol), n, chosen.tol)
        drawing.lines(
            f"at the full depth {depth}: {percent(calibration.correct / n)} of {n} puzzles right",
            f"chosen: tol {chosen.tol:g}: {percent(chosen.correct / n)} right after a mean of "
            f"{chosen.mean_steps:.1f} steps, {percent(chosen.converged / n)} settled",
            f"written to {report['written']}" if write else "not stored; --write stores it in the model's card",
        )
    return INCOMPLETE if errors else 0


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


def _condensed(candidates: list[dict[str, Any]], chosen: float | None) -> list[dict[str, Any]]:
    """Some two dozen of the candidates that some puzzle meets, the chosen one among them."""
    met = [c for c in candidates if c["converged"]] or candidates
    every = max(1, len(met) // _SHOWN)
    return [c for i, c in enumerate(met) if i % every == 0 or c["tol"] == chosen or i == len(met) - 1]
