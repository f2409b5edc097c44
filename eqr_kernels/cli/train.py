"""`eqr train`: what a run is made of; `training_run` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import INTERRUPTED, busy, command, complain, parse_counts
from eqr_kernels.training.recipes import DECAY_END, DEFAULT_PRESET, PRESETS

if TYPE_CHECKING:
    from eqr_kernels.cli.puzzles import Task
    from eqr_kernels.config import EqRConfig
    from eqr_kernels.tasks.common import PuzzleSet
    from eqr_kernels.training.initial_weights import InitialWeights


_EVALUATED_ON, _CALIBRATED_ON = 200, 100
"""Puzzles that are measured; that the tolerance is found on where none are held out."""
_DEPTHS = "4,16,64"


@command
def train(
    data: Annotated[str, typer.Option(help="Puzzles with answers, in any form that `eqr solve` reads.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: its state, and the averaged weights with their card.")],
    preset: Annotated[
        str | None,
        typer.Option(help="sudoku, sudoku-medium (a TRM), sudoku-small or maze.", show_default=DEFAULT_PRESET),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of EqRConfig; may be repeated."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Start from these weights (--model of other commands) as an EqR."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of each process.", show_default="the preset's")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the preset's")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps to reach it.", show_default="the preset's")] = None,
    lr_min_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of --lr where a cosine ends; 1 keeps it constant.",
            show_default=f"1; {DECAY_END} with --decay-from or --finish",
        ),
    ] = None,
    decay_from: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="Where that cosine, which ends at --steps, begins.", show_default="--warmup"),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamATan2.", show_default="the preset's")] = None,
    ema_rate: Annotated[float | None, typer.Option(help="Of the averaged weights.", show_default="0.999")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps in all.", show_default="the preset's")] = None,
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
    seed: Annotated[int | None, typer.Option(help="Of weights, data, starts and noise.", show_default="0")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the forward pass: float32, bfloat16.", show_default="the preset's")
    ] = None,
    device: opt.Device = "auto",
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Run the step compiled.")] = True,
    fused: Annotated[
        bool, typer.Option("--fused/--no-fused", help="The fused CPU kernels: in bfloat16 the whole outer step.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its settings.")] = False,
    slice_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Between saves, at which every row starts afresh.",
            show_default="about 45 seconds, as first measured",
        ),
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, metavar="STEPS", help="Between progress lines.")] = 50,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out puzzles with answers, to measure the averaged weights on.")
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEPS", help="Between two measurements.", show_default="only at the end"),
    ] = None,
    eval_puzzles: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of --eval-data: a fixed subset, as many of each source.", show_default=str(_EVALUATED_ON)
        ),
    ] = None,
    eval_depths: Annotated[
        str | None, typer.Option(metavar="DEPTHS", help="Where they are measured.", show_default=_DEPTHS)
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

    The preset sudoku-medium trains a TRM (a fixed start, neither noise nor damping), of which --init makes an EqR.

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
    where --set does not say otherwise. The schedule is then batch size 96, --lr 1e-4, --warmup 100, --ema-rate 0.99 and
    no curriculum.

    A report ends with the samples a second, the operations a second of their matrix products, and what share that is of
    the rate of big matrix products (torch.matmul in --dtype), which is measured as the run starts.

    Exit code 0: the steps or minutes are done; 2: nothing could be done; 130: interrupted, and saved.
    """
    given = dict(
        batch_size=batch_size,
        lr=lr,
        lr_warmup_steps=warmup,
        lr_min_ratio=lr_min_ratio,
        decay_from=decay_from,
        weight_decay=weight_decay,
        ema_rate=ema_rate,
        total_steps=steps,
        curriculum=curriculum,
        cycles=cycles,
        mix=mix,
        seed=seed,
        forward_dtype=dtype,
        slice_steps=slice_steps,
    )
    for name, value in (("--minutes", minutes), ("--finish", finish)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value:g}")
    if init is not None and resume:
        raise ValueError("--init starts a new run and --resume continues one with its own weights; give one of them")
    if finish is not None:
        _check_finish(
            resume=resume, init=init, preset=preset, set=changes, minutes=minutes, steps=steps, decay_from=decay_from
        )
    _check_evaluation(eval_data, eval_every=eval_every, eval_puzzles=eval_puzzles, eval_depths=eval_depths)
    depths = parse_counts("--eval-depths", eval_depths or _DEPTHS)
    with busy("loading torch"):
        import torch

        from eqr_kernels.cli.puzzles import SUDOKU, task_of
        from eqr_kernels.studies import digest
        from eqr_kernels.training import evaluation as measuring
        from eqr_kernels.training import logs as logging
        from eqr_kernels.training import run as running
        from eqr_kernels.training import settings as setting
        from eqr_kernels.training.state import has_state, read_manifest
    if not resume and finish is None and has_state(out):
        raise ValueError(f"--out {out} holds a run already; continue it with --resume, or name another folder")
    with running.processes(device) as process:
        if finish is not None:
            out = running.copy_to_anneal(out, process)
        manifest: dict[str, Any] = {"settings": {}, "step": 0}
        if resume or finish is not None:
            manifest = read_manifest(out)
        stored: dict[str, Any] = manifest["settings"]
        start = None if init is None else _initial_weights(init, preset, changes or [])
        config = _config(preset, changes or [], stored) if start is None else start.config
        settings = setting.settings_of(given, preset, stored, fine_tuning=start is not None)
        if finish is not None:
            settings |= {"total_steps": None, "decay_from": None}
        setting.complete_schedule(settings, minutes, finish, lr_min_ratio)
        task = task_of(config)
        if settings["curriculum"] and task is not SUDOKU:
            raise ValueError(f'--curriculum is for Sudoku, and the config is one of the {task.name} task; set it to ""')
        puzzles = _answered(task, config, data, "train", whole=True)
        held_out = puzzles if eval_data is None else _answered(task, config, eval_data, "test", whole=False)
        assert puzzles.labels is not None
        settings |= {"config": config.to_dict(), "data_sha256": digest(puzzles.inputs, puzzles.labels)}
        if start is not None:
            settings["init"] = start.record
        elif "init" in stored:
            settings["init"] = stored["init"]
        settings["processes"] = process.world
        # They decide the last bits of the fused step's gradients, whatever the threads of a resumed run.
        settings["workers"] = stored.get("workers") or process.agree(torch.get_num_threads())
        how = {"compile": compile, "fused": fused}
        if stored:
            setting.check_resumed(stored, settings, how, f"the run in {out}", manifest["step"])
        settings |= how
        run = running.TrainingRun(
            task,
            puzzles,
            config,
            settings,
            out,
            process,
            data=Path(data).name,
            initial=None if start is None else start.state_dict,
        )
        settings |= setting.machine(stored, run.trainer.kernel)
        if stored:
            run.load()
        elif process.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if start is not None:
                complain(str(start), "note")
        if process.rank == 0 and run.over:
            complain(f"the run in {out} is at the last of its --steps, {run.trainer.step}; give more to go on", "note")
        if process.rank == 0 and not as_json:
            print(run.introduction(len(puzzles)), flush=True)
        logs: list[logging.Log] = [logging.JsonLog() if as_json else logging.TextLog()]
        if tensorboard and process.rank == 0:
            logs.append(logging.TensorBoardLog(out / "tensorboard"))
        count = eval_puzzles or (_EVALUATED_ON if eval_data else _CALIBRATED_ON)
        sets = measuring.evaluation_sets(task, held_out, count)
        evaluator = None
        if eval_data is not None:
            precision = {"float32": "fp32", "bfloat16": "bf16"}[settings["forward_dtype"]]
            evaluator = measuring.Evaluator(sets, depths, precision)
        interrupted = run.train(minutes, log_every, logs, finish=finish, evaluator=evaluator, evaluate_every=eval_every)
        if process.rank == 0:
            for message in run.closing_notes(interrupted):
                complain(message, "note")
            if calibrate and not interrupted:
                with busy("calibrating the tolerance"):
                    message = measuring.calibrate_model(out, sets, Path(eval_data or data).name, process.device)
                complain(message, "note")
    return INTERRUPTED if interrupted else 0


def _check_finish(**others: Any) -> None:
    """Raises a ValueError where --finish is given with what it decides itself."""
    wrong = ["--" + name.replace("_", "-") for name, value in others.items() if value not in (None, False)]
    if wrong:
        raise ValueError(
            "--finish anneals a copy of the run in --out, and decides where that begins and ends; leave out "
            + ", ".join(wrong)
        )


def _check_evaluation(eval_data: str | None, **others: Any) -> None:
    """Raises a ValueError where something is said of an evaluation that nothing is there for."""
    given = ["--" + name.replace("_", "-") for name, value in others.items() if value is not None]
    if given and eval_data is None:
        raise ValueError(f"{', '.join(given)} without --eval-data, the held-out puzzles to measure on; give that too")


def _initial_weights(init: str, preset: str | None, changes: list[str]) -> InitialWeights:
    with busy(f"loading {init}"):
        from eqr_kernels.training.initial_weights import initial_weights

        return initial_weights(init, _fields(changes), None if preset is None else _config(preset, [], {}))


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


def _config(preset: str | None, changes: list[str], stored: dict[str, Any]) -> EqRConfig:
    from eqr_kernels.config import EqRConfig

    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    fields = _fields(changes)
    if preset is None and "config" in stored:
        return EqRConfig.from_dict({**stored["config"], **fields})
    config: EqRConfig = getattr(EqRConfig, PRESETS[preset or DEFAULT_PRESET])(**fields)
    return config


def _answered(task: Task, config: EqRConfig, data: str, part: str, *, whole: bool) -> PuzzleSet:
    """The puzzles of `data` (of its `part`, where it is a folder of both) that come with answers.

    Args:
        whole: every row must be one, as in data to train on; else the others are named and passed over.

    Raises:
        ValueError: a row is no puzzle or has no answer.
    """
    from eqr_kernels.cli.puzzles import read_puzzles, report_errors, with_answers

    both = all((Path(data) / name).is_dir() for name in ("train", "test"))
    with busy(f"reading {data}"):
        read = read_puzzles(task, config.seq_len, data, split=part if both else None)
        puzzles, errors = with_answers(*read, task)
    if errors and whole:
        raise ValueError(f"{data}: {len(errors)} rows cannot be trained on, the first on {errors[0]}; remove them")
    report_errors(errors)
    return puzzles
