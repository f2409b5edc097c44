"""`eqr train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import INTERRUPTED, busy, command, complain, parse_counts
from eqr_kernels.cli.interrupt import StopRequest
from eqr_kernels.cli.puzzles import read_puzzles, report_errors, with_answers
from eqr_kernels.cli.train_log import JsonLog, TextLog
from eqr_kernels.config import EqRConfig
from eqr_kernels.precision import Precision
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.task import Task
from eqr_kernels.training.evaluation import CURVE, Evaluator, calibrate_model, evaluation_sets
from eqr_kernels.training.logs import Log, TensorBoardLog
from eqr_kernels.training.plan import RunRequest, plan_run
from eqr_kernels.training.processes import processes
from eqr_kernels.training.recipes import DECAY_END, DEFAULT_PRESET
from eqr_kernels.training.run import TrainingRun

_EVALUATED_ON, _CALIBRATED_ON = 200, 100
"""Puzzles that are measured; that the tolerance is chosen on where none are held out."""
_DEPTHS = "4,16,64"


@command
def train(
    data: Annotated[str, typer.Option(help="Puzzles with answers, in any form that `eqr solve` reads.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: its state, and the averaged weights with their card.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="sudoku-paper (as published), sudoku, sudoku-small, maze (as published) or maze-small.",
            show_default=DEFAULT_PRESET,
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of EqRConfig; may be repeated."),
    ] = None,
    task: opt.TaskName = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Start from these weights (--model of other commands) as an EqR."),
    ] = None,
    attention_init: Annotated[
        str | None,
        typer.Option(
            metavar="random|local",
            help="How attention is drawn; local: heads begin at neighbouring squares (rope2d, rope_theta < 1).",
            show_default="the preset's",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows in flight in each process.", show_default="the preset's")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adam_atan2, or muon for the matrices of the blocks.", show_default="the preset's"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the preset's")] = None,
    muon_lr: Annotated[
        float | None, typer.Option(help="Learning rate of what muon trains.", show_default="that of the rest")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps in which the learning rate rises to --lr.", show_default="the preset's")
    ] = None,
    lr_min_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of --lr where a cosine ends; 1 keeps it constant.",
            show_default=f"1; {DECAY_END} with --decay-from or --finish",
        ),
    ] = None,
    decay_from: Annotated[
        int | None,
        typer.Option(
            metavar="STEP", help="Step at which that cosine, which ends at --steps, begins.", show_default="--warmup"
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay, multiplied by the rate.", show_default="the preset's")
    ] = None,
    ema_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the old average that each update of the averaged weights keeps.", show_default="0.999"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of the whole run.", show_default="the preset's")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop at the last slice's end within this time.")] = None,
    finish: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Anneal a copy of the run in --out, into OUT/annealed-STEP: the rate falls to its end in this time.",
        ),
    ] = None,
    cycles: Annotated[
        str | None,
        typer.Option(
            help='H_cycles x L_cycles x halt_max_steps from a step on, as in "0:1x3x16,20000:1x6x16"; or "".',
            show_default="those of the config",
        ),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE=SHARE,...",
            help='Shares of the puzzles by their source, and no curriculum where --curriculum gives none; or "".',
            show_default="all puzzles alike",
        ),
    ] = None,
    curriculum: Annotated[
        str | None,
        typer.Option(
            help='Clues to show from a step on, as in "0:34-50,1200:30-46"; or "".', show_default="the preset's"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data, starts and noise.", show_default="0")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Arithmetic of the forward pass: float32 or bfloat16.", show_default="the preset's"),
    ] = None,
    device: opt.Device = "auto",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Run the step compiled.")] = True,
    fused: Annotated[
        bool,
        typer.Option("--fused/--no-fused", help="Use the fused CPU kernels: in bfloat16 for the whole outer step."),
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its settings.")] = False,
    slice_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Training steps between two saves, at which every row starts afresh.",
            show_default="about 45 seconds, as first measured",
        ),
    ] = None,
    log_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", help="Training steps between two progress lines.")
    ] = 50,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out puzzles with answers, to measure the averaged weights on.")
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="STEPS", help="Training steps between two measurements.", show_default="only at the end"
        ),
    ] = None,
    eval_puzzles: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Puzzles of --eval-data to measure, a fixed subset.",
            show_default=str(_EVALUATED_ON),
        ),
    ] = None,
    eval_depths: Annotated[
        str | None, typer.Option(metavar="DEPTHS", help="Depths at which they are measured.", show_default=_DEPTHS)
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Find the model's tolerance at the end, for its card.")
    ] = True,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to OUT/tensorboard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as one JSON object a line.")] = False,
) -> int:
    """Train a model, resumably to the same result; Ctrl-C saves and stops.

    Training goes in slices, and each ends with a save, so a run that is killed loses one slice at most. A run that
    stops at the end of a slice (as with --minutes) and is resumed equals an uninterrupted one bit for bit. A stop in
    between (Ctrl-C; --steps or --minutes that end sooner) adds a save, so the result is another, though as good.

    OUT gets the state of the run, and model.safetensors with model.json: the averaged weights, as `--model OUT` of the
    other commands takes them. torchrun starts one process a device, each with rows and puzzles of its own.

    --task trains on a task of your own, and gives the config its seq_len and vocab_size; a preset's curriculum is for
    Sudoku alone. A run remembers its task's name; one of package.module:OBJECT is named again with --resume.

    --set fixed_init=true lambda_=1 noise_scale=0 (one --set each) trains a TRM, of which --init makes an EqR.

    The rate stays constant until a decay is asked for, and steps drive all that changes along a run: it may be stopped
    and continued at any time. --resume may give --cycles and --curriculum anew where they agree on the steps that are
    done. --finish anneals a copy: the run in --out stays as it is and can go on, even meanwhile. --decay-from with
    --steps anneals the run itself, also one that is resumed.

    --eval-data measures the averaged weights on a fixed subset, as published and with 28 clues shown, to the full
    --eval-depths without halting: lines in the log, and rows of OUT/curve.csv with the operations, the seconds and the
    samples that they had cost. At the end, after the time that was given, the tolerance is calibrated on those puzzles
    (else on some that were trained on) and stored in the model's card: the loosest that costs no answer and with which
    99 % of what settles is right.

    --init starts a new run from weights that were trained before, with the config that came with them; --set changes
    what they do not depend on. A TRM (a fixed start) becomes an EqR: fixed_init=false, lambda_=0.95, noise_scale=0.01,
    where --set does not say otherwise. The schedule is then batch size 96, --lr 1e-4, --warmup 100, --ema-rate 0.99,
    --dtype float32 and no curriculum.

    A report ends with the samples a second, the operations a second of their matrix products, and what share that is of
    the rate of big matrix products (torch.matmul in --dtype), which is measured as the run starts.

    Exit code 0: the steps or minutes are done; 2: nothing could be done; 130: interrupted, and saved.
    """
    options = dict(
        attention_init=attention_init,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        muon_lr=muon_lr,
        lr_warmup_steps=warmup,
        lr_min_ratio=lr_min_ratio,
        decay_from=decay_from,
        weight_decay=weight_decay,
        ema_rate=ema_rate,
        total_steps=steps,
        curriculum=curriculum,
        mix=mix,
        cycles=cycles,
        forward_dtype=dtype,
        slice_steps=slice_steps,
        compile=compile,
        fused=fused,
        seed=seed,
    )
    request = RunRequest(out, options, preset, _fields(changes or []), task, init, resume, minutes, finish)
    _check_evaluation(eval_data, eval_every=eval_every, eval_puzzles=eval_puzzles, eval_depths=eval_depths)
    depths = parse_counts("--eval-depths", eval_depths or _DEPTHS)
    with processes(device) as process:
        with busy("preparing the run"):
            plan = plan_run(request, process)
        puzzles = _answered(plan.task, plan.config, data, "train", whole=True)
        held_out = puzzles if eval_data is None else _answered(plan.task, plan.config, eval_data, "test", whole=False)
        run = TrainingRun(plan, puzzles, process, data=Path(data).name)
        first = process.rank == 0
        if plan.stored is not None:
            run.load()
            if first and eval_data is None and (out / CURVE).exists():
                complain(
                    f"{out / CURVE} has what --eval-data measured before; it is not given now, so nothing is measured"
                    + (", and the tolerance is calibrated on puzzles that were trained on" if calibrate else ""),
                    "note",
                )
        elif first:
            plan.out.mkdir(parents=True, exist_ok=True)
            if plan.initial is not None:
                complain(str(plan.initial), "note")
        if first and run.over:
            complain(
                f"the run in {plan.out} is at the last of its --steps, {run.trainer.step}; give more to go on", "note"
            )
        if first and not as_json:
            print(run.introduction(len(puzzles)), flush=True)
        logs: list[Log] = [JsonLog() if as_json else TextLog()]
        if tensorboard and first:
            logs.append(TensorBoardLog(plan.out / "tensorboard"))
        count = eval_puzzles or (_EVALUATED_ON if eval_data else _CALIBRATED_ON)
        sets = evaluation_sets(plan.task, held_out, count)
        evaluator = None
        if eval_data is not None:
            evaluator = Evaluator(sets, depths, Precision(getattr(torch, plan.settings.forward_dtype)).name)
        with StopRequest() as stop:
            interrupted = run.train(
                minutes, log_every, logs, finish=finish, evaluator=evaluator, evaluate_every=eval_every, stop=stop
            )
        if first:
            for message in run.closing_notes(interrupted):
                complain(message, "note")
            if calibrate and not interrupted:
                with busy("calibrating the tolerance"):
                    message = calibrate_model(plan.out, sets, Path(eval_data or data).name, process.device)
                complain(message, "note")
    return INTERRUPTED if interrupted else 0


def _check_evaluation(eval_data: str | None, **others: Any) -> None:
    """Raises a ValueError where options of the evaluation are given without puzzles to evaluate on."""
    given = ["--" + name.replace("_", "-") for name, value in others.items() if value is not None]
    if given and eval_data is None:
        raise ValueError(f"{', '.join(given)} without --eval-data, the held-out puzzles to measure on; give that too")


def _fields(changes: list[str]) -> dict[str, Any]:
    """Fields of EqRConfig from "FIELD=VALUE"."""
    fields: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set must be FIELD=VALUE, as in hidden_size=256, got {change!r}")
        try:
            fields[name.strip()] = json.loads(text)
        except ValueError:
            fields[name.strip()] = text
    return fields


def _answered(task: Task, config: EqRConfig, data: str, part: str, *, whole: bool) -> PuzzleSet:
    """The puzzles of `data` (of its `part`, where it is a folder of both) that come with answers.

    Args:
        whole: every row must be one, as in data to train on; else the others are named and passed over.

    Raises:
        ValueError: a row is no puzzle or has no answer.
    """
    both = all((Path(data) / name).is_dir() for name in ("train", "test"))
    read = read_puzzles(task, config.seq_len, data, split=part if both else None)
    puzzles, errors = with_answers(*read, task)
    if errors and whole:
        raise ValueError(f"{data}: {errors.total} rows cannot be trained on, the first on {errors[0]}; remove them")
    report_errors(errors)
    return puzzles
