"""`eqr train`: what a run is made of; `training_run` runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eqr_kernels.commands import options as opt
from eqr_kernels.commands.console import INTERRUPTED, busy, command, complain, parse_counts

if TYPE_CHECKING:
    from eqr_kernels.commands.initial_weights import InitialWeights
    from eqr_kernels.commands.puzzles import Task
    from eqr_kernels.config import EqRConfig
    from eqr_kernels.tasks.common import PuzzleSet

_PUBLISHED: dict[str, Any] = dict(batch_size=768, lr=1e-4, lr_warmup_steps=2000, total_steps=50_000, curriculum="")
_SMALL: dict[str, Any] = dict(
    batch_size=96, lr=1e-3, lr_warmup_steps=200, total_steps=None, forward_dtype="bfloat16",
    curriculum="0:34-50,1200:30-46,4000:20-40,6500:17-38",
)  # fmt: skip
_MEDIUM: dict[str, Any] = dict(
    batch_size=32, lr=2e-3, lr_warmup_steps=150, weight_decay=0.1, total_steps=None, forward_dtype="bfloat16",
    curriculum="0:34-50,1000:28-44,2200:22-40,6000:19-36,12000:17-30",
)  # fmt: skip
# Weights that were trained before need no long memory of the steps that follow.
_FINE_TUNING: dict[str, Any] = dict(
    batch_size=96, lr=1e-4, lr_warmup_steps=100, total_steps=None, curriculum="", ema_rate=0.99
)
# On a CPU attention has no fused kernel in bfloat16, and PyTorch's is slow without instructions for it.
RECIPES = {
    "sudoku": {**_PUBLISHED, "forward_dtype": "bfloat16"}, "sudoku-medium": _MEDIUM, "sudoku-small": _SMALL,
    "maze": _PUBLISHED,
}  # fmt: skip
"""The schedule of each preset, where the command line does not say otherwise."""

_PRESETS = {name: name.replace("-", "_") for name in RECIPES}
_PRESET = "sudoku-medium"
_COMMON: dict[str, Any] = dict(lr_min_ratio=1.0, decay_from=None, weight_decay=1.0, ema_rate=0.999, cycles="", mix="",
                               forward_dtype="float32", seed=0, slice_steps=None)  # fmt: skip
_CALIBRATED_ON = 100
"""Puzzles that the tolerance is found on where none are held out."""
_DECAY_END = 0.03
"""Share of the rate where a decay that --decay-from or --finish begins ends, where --lr-min-ratio does not say."""
_OPTION_OF = {
    "lr_warmup_steps": "--warmup", "forward_dtype": "--dtype", "total_steps": "--steps", "config": "--preset and --set",
    "data_sha256": "the puzzles of --data", "processes": "the number of processes",
}  # fmt: skip


@command
def train(
    data: Annotated[str, typer.Option(help="Puzzles with answers, in any form that `eqr solve` reads.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: its state, and the averaged weights with their card.")],
    preset: Annotated[
        str | None, typer.Option(help="sudoku, sudoku-medium, sudoku-small or maze.", show_default=_PRESET)
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
            show_default=f"1; {_DECAY_END} with --decay-from or --finish",
        ),
    ] = None,
    decay_from: Annotated[
        int | None,
        typer.Option(metavar="STEP", help="Where that cosine, which ends at --steps, begins.", show_default="--warmup"),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of AdamATan2.", show_default="the preset's")
    ] = None,
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
        int, typer.Option(min=1, help="Of --eval-data: a fixed subset, as many of each source.")
    ] = 200,
    eval_depths: Annotated[str, typer.Option(help="Where they are measured.")] = "4,16,64",
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

    The rate stays constant until a decay is asked for, and steps drive all that changes along a run: it may be stopped
    and continued at any time, and what --cycles and --curriculum say of the steps to come be said anew. --finish
    anneals a copy: the run in --out stays as it is and can go on, even meanwhile. --decay-from with --steps anneals the
    run itself, also one that is resumed.

    --eval-data measures the averaged weights on a fixed subset, as published and with 28 clues shown, to the full
    --eval-depths without halting: lines in the log, and rows of OUT/curve.csv with the operations, the seconds and the
    samples that they had cost. At the end the tolerance is calibrated, on those puzzles (else on some that were trained
    on), and stored in the model's card: the loosest that costs no answer and with which 99 % of what settles is right.

    --init starts a new run from weights that were trained before, with the config that came with them; --set changes
    what they do not depend on. A TRM (a fixed start) becomes an EqR: fixed_init=false, lambda_=0.95, noise_scale=0.01,
    where --set does not say otherwise. The schedule is then batch size 96, --lr 1e-4, --warmup 100, --ema-rate 0.99 and
    no curriculum.

    A report ends with the samples a second, the operations a second of their matrix products, and what share that is of
    the rate of big matrix products (torch.matmul in --dtype), which is measured as the run starts.

    Exit code 0: the steps or minutes are done; 2: nothing could be done; 130: interrupted, and saved.
    """
    given = dict(
        batch_size=batch_size, lr=lr, lr_warmup_steps=warmup, lr_min_ratio=lr_min_ratio, decay_from=decay_from,
        weight_decay=weight_decay, ema_rate=ema_rate, total_steps=steps, curriculum=curriculum, cycles=cycles, mix=mix,
        seed=seed, forward_dtype=dtype, slice_steps=slice_steps,
    )  # fmt: skip
    for name, value in (("--minutes", minutes), ("--finish", finish)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value:g}")
    if init is not None and resume:
        raise ValueError("--init starts a new run and --resume continues one with its own weights; give one of them")
    if finish is not None:
        _check_finish(resume=resume, init=init, minutes=minutes, steps=steps, decay_from=decay_from)
    if mix and curriculum is None:
        given["curriculum"] = ""
    depths = parse_counts("--eval-depths", eval_depths)
    stored = _stored(out, resume or finish is not None)
    with busy("loading torch"):
        import torch

        from eqr_kernels.checkpoint import MODEL_FILE
        from eqr_kernels.commands import training_evaluation as measuring
        from eqr_kernels.commands import training_logs as logging
        from eqr_kernels.commands import training_run as running
        from eqr_kernels.commands.puzzles import SUDOKU, read_answered, task_of
        from eqr_kernels.evaluation import digest
    start = None if init is None else _initial_weights(init, preset, changes or [])
    config = _config(preset, changes or [], stored) if start is None else start.config
    settings = _settings(given, preset, stored, fine_tuning=start is not None)
    source = out
    if finish is not None:
        out = _annealed(out)
        settings |= {"total_steps": None, "decay_from": None}
    _check_schedule(settings, minutes, finish, lr_min_ratio)
    task = task_of(config)
    if settings["curriculum"] and task is not SUDOKU:
        raise ValueError(f'--curriculum is for Sudoku, and the config is one of the {task.name} task; set it to ""')
    with busy(f"reading {data}"):
        puzzles = _training_puzzles(task, config, data)
    assert puzzles.labels is not None
    held_out = puzzles
    if eval_data is not None:
        held_out, _ = read_answered(task, config.seq_len, eval_data, split=_split(eval_data, "test"))
    settings |= {"config": config.to_dict(), "data_sha256": digest(puzzles.inputs, puzzles.labels)}
    if start is not None:
        settings["init"] = start.record
    elif "init" in stored:
        settings["init"] = stored["init"]
    with running.processes(device) as process:
        settings["processes"] = process.world
        # They decide the last bits of the fused step's gradients, whatever the threads of a resumed run.
        settings["workers"] = stored.get("workers") or process.agree(torch.get_num_threads())
        how = {"compile": compile, "fused": fused}
        _compare(stored, settings, how, source, finishing=finish is not None)
        settings |= how
        run = running.TrainingRun(
            task, puzzles, config, settings, out, process, data=Path(data).name,
            initial=None if start is None else start.state_dict,
        )  # fmt: skip
        settings |= _machine(stored, run.trainer.kernel)
        if stored:
            run.load(source)
        if process.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            if start is not None:
                complain(str(start), "note")
        if process.rank == 0 and not as_json:
            parameters = sum(p.numel() for p in run.trainer.model.parameters())
            print(
                f"{config.hidden_size} features, {parameters:,} parameters, "
                f"{len(puzzles):,} puzzles, {process.world} process(es) on {process.device.type} "
                f"({torch.get_num_threads()} threads); from step {run.trainer.step}\n"
                f"outer steps: {run.trainer.kernel}\n"
                f"GEMM: {run.gemm_rate / 1e12:.2f} TFLOP/s in {settings['forward_dtype']} (torch.matmul)",
                flush=True,
            )
        logs: list[logging.Log] = [logging.JsonLog() if as_json else logging.TextLog()]
        if tensorboard and process.rank == 0:
            logs.append(logging.TensorBoardLog(out / "tensorboard"))
        evaluator = None
        if eval_data is not None:
            sets = measuring.evaluation_sets(task, held_out, eval_puzzles)
            precision = {"float32": "fp32", "bfloat16": "bf16"}[settings["forward_dtype"]]
            evaluator = measuring.Evaluator(sets, depths, precision)
        interrupted = run.train(
            minutes, log_every, logs, finish=finish, evaluator=evaluator, evaluate_every=eval_every
        )  # fmt: skip
        step, total = run.trainer.step, run.trainer.config.total_steps
        between = "" if run.at_boundary else " (not bit for bit as if it had gone on, since no slice ended there)"
        if interrupted:
            complain(f"interrupted at step {step}; the state is saved, and --resume continues it{between}", "note")
            return INTERRUPTED
        if process.rank == 0:
            if between and step != total:
                told = f"time was over at step {step}; the state is saved, and --resume continues it{between}"
                complain(told, "note")
            _tell_averages(step, settings["ema_rate"])
            if calibrate:
                sets = measuring.evaluation_sets(task, held_out, eval_puzzles if eval_data else _CALIBRATED_ON)
                with busy("calibrating the tolerance"):
                    name = Path(eval_data or data).name
                    message = measuring.calibrate_model(out / MODEL_FILE, sets, name, process.device)
                complain(message, "note")
    return 0


def _check_finish(**others: Any) -> None:
    """Raises a ValueError where --finish is given with what it decides itself."""
    wrong = ["--" + name.replace("_", "-") for name, value in others.items() if value not in (None, False)]
    if wrong:
        raise ValueError(
            "--finish anneals a copy of the run in --out, and decides where that begins and ends; leave out "
            + ", ".join(wrong)
        )


def _annealed(out: Path) -> Path:
    """Where the annealed copy of the newest state of a run goes.

    Raises:
        ValueError: it is there already, or the rate has not come up yet.
    """
    from eqr_kernels.training_state import read_manifest

    manifest = read_manifest(out)
    step, warmup = manifest["step"], manifest["settings"]["lr_warmup_steps"]
    if step < warmup:
        raise ValueError(f"--finish: the run in {out} is at step {step} of its warm-up of {warmup}; train on first")
    folder = out / f"annealed-{step:09d}"
    if any(folder.glob("state-*/manifest.json")):
        raise ValueError(
            f"--finish: {folder} has been begun; continue it with --out {folder} --resume, or move it away"
        )
    return folder


def _check_schedule(
    settings: dict[str, Any], minutes: float | None, finish: float | None, lr_min_ratio: float | None
) -> None:
    """Completes the settings of a decay that is asked for.

    Raises:
        ValueError: nothing says when to stop, or where a decay ends.
    """
    total, begin = settings["total_steps"], settings["decay_from"]
    if total is None and minutes is None and finish is None:
        raise ValueError("nothing says when to stop; give --steps or --minutes")
    if begin is None and finish is None:
        return
    if begin is not None and (total is None or total <= begin):
        raise ValueError(f"--decay-from {begin} needs --steps beyond it, where the rate has come down, got {total}")
    if settings["lr_min_ratio"] >= 1:
        if lr_min_ratio is not None:
            raise ValueError(f"--lr-min-ratio must be below 1 for the rate to fall, got {lr_min_ratio:g}")
        settings["lr_min_ratio"] = _DECAY_END


def _tell_averages(step: int, rate: float) -> None:
    """Says so where a run was too short for its averages to reach their rate."""
    from eqr_kernels.optim import EMA

    if step < EMA.warm_up(rate):
        complain(
            f"{step} steps are too few for --ema-rate {rate:g}, which the averages reach at step {EMA.warm_up(rate)}; "
            f"they span the last {(step + 10) // 9} steps or so",
            "note",
        )


def _stored(out: Path, resume: bool) -> dict[str, Any]:
    """The settings of the run to be resumed; {} for a new one."""
    if not resume:
        if any(out.glob("state-*/manifest.json")):
            raise ValueError(f"--out {out} holds a run already; continue it with --resume, or name another folder")
        return {}
    from eqr_kernels.training_state import read_manifest

    settings: dict[str, Any] = read_manifest(out)["settings"]
    return settings


def _initial_weights(init: str, preset: str | None, changes: list[str]) -> InitialWeights:
    with busy(f"loading {init}"):
        from eqr_kernels.commands.initial_weights import initial_weights

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

    if preset is not None and preset not in _PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    fields = _fields(changes)
    if preset is None and "config" in stored:
        return EqRConfig.from_dict({**stored["config"], **fields})
    config: EqRConfig = getattr(EqRConfig, _PRESETS[preset or _PRESET])(**fields)
    return config


def _settings(
    given: dict[str, Any], preset: str | None, stored: dict[str, Any], *, fine_tuning: bool = False
) -> dict[str, Any]:
    """Each setting as the command line says, else as the resumed run has it, else as the preset's recipe has it.

    The presets' recipes are for training from nothing, so fine-tuning has one of its own.
    """
    recipe = {**_COMMON, **(_FINE_TUNING if fine_tuning else RECIPES[preset or _PRESET])}
    return {
        name: value if value is not None else stored[name] if name in stored else recipe[name]
        for name, value in given.items()
    }


def _training_puzzles(task: Task, config: EqRConfig, data: str) -> PuzzleSet:
    """The puzzles to train on, all of them with answers.

    Raises:
        ValueError: a row is no puzzle or has no answer: data to train on must be whole.
    """
    from eqr_kernels.commands.puzzles import read_puzzles, with_answers

    puzzles, errors = with_answers(*read_puzzles(task, config.seq_len, data, split=_split(data, "train")), task)
    if errors:
        raise ValueError(f"{data}: {len(errors)} rows cannot be trained on, the first on {errors[0]}; remove them")
    return puzzles


def _split(data: str, name: str) -> str | None:
    """`name` where the data is a folder of both parts."""
    return name if all((Path(data) / name).is_dir() for name in ("train", "test")) else None


def _compare(
    stored: dict[str, Any], settings: dict[str, Any], how: dict[str, bool], out: Path, *, finishing: bool
) -> None:
    """Refuses to resume a run with other settings, which would give another result than the run it continues.

    Args:
        finishing: a copy is annealed, whose decay is its own.

    Raises:
        ValueError: a setting that both have differs.
    """
    if not stored:
        return
    from eqr_kernels.training_state import read_manifest

    step, schedule = read_manifest(out)["step"], {"total_steps", "decay_from", "lr_min_ratio"}
    # They only say when to stop, and where the rate will fall, unless it has begun to.
    begun = not finishing and any(_decay_begins(some) < step for some in (stored, settings))
    free = set() if begun else schedule
    if stored.get("slice_steps") is None:  # the run was stopped before its speed was measured
        free.add("slice_steps")
    free |= _same_so_far(stored, settings, step)
    differ = [name for name in settings if name in stored and stored[name] != settings[name] and name not in free]
    if differ:
        told = "; ".join(_difference(name, stored[name], settings[name]) for name in differ)
        raise ValueError(f"--resume continues the run in {out} with its own settings, and these differ: {told}")
    missing = sorted(name for name in settings if name not in stored)
    if missing:
        told = ", ".join(missing)
        complain(f"the state in {out} does not say {told}; taken from the command line and the preset", "warning")
    for name, value in how.items():
        # A state from before there was a fused kernel was trained without.
        if stored.get(name, name != "fused") != value:
            told = f"--{name if value else f'no-{name}'} is not as before"
            complain(f"{told}: the result equals an uninterrupted run's to rounding only", "warning")


def _same_so_far(stored: dict[str, Any], settings: dict[str, Any], step: int) -> set[str]:
    """Which of the schedules by step may differ, as they agree on all steps that are done."""
    from eqr_kernels.config import EqRConfig
    from eqr_kernels.cycles import parse_cycles, stretches
    from eqr_kernels.tasks.stream import parse_curriculum, same_clues

    def cycles(some: dict[str, Any]) -> Any:
        return stretches(parse_cycles(some.get("cycles", "")), EqRConfig.from_dict(some["config"]), step)

    def curriculum(some: dict[str, Any]) -> Any:
        return parse_curriculum(some["curriculum"]) if some["curriculum"] else ()

    same = {"cycles"} if cycles(stored) == cycles(settings) else set()
    if "curriculum" in stored and same_clues(curriculum(stored), curriculum(settings), step):
        same.add("curriculum")
    return same


def _decay_begins(settings: dict[str, Any]) -> float:
    """The step from which on the rate falls; infinity where it does not."""
    if settings["lr_min_ratio"] >= 1 or settings["total_steps"] is None:
        return math.inf
    begin = settings.get("decay_from")
    return float(settings["lr_warmup_steps"] if begin is None else begin)


def _machine(stored: dict[str, Any], kernel: str) -> dict[str, Any]:
    """What trains here, as far as it decides last bits; warns where that is not what trained `stored`."""
    import torch

    from eqr_kernels import ops

    here = {"kernel": kernel, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if ops.extension_status()[0]:
        here["isa"] = ops.cpu_isa()
    for name, value in here.items():
        if stored.get(name, value) != value:
            same = "is another one, of other random numbers" if name == "kernel" else "differs in its last bits"
            complain(f"{name} was {stored[name]!r}, now {value!r}: the result {same}", "warning")
    return here


def _difference(name: str, before: Any, now: Any) -> str:
    option = _OPTION_OF.get(name, "--" + name.replace("_", "-"))
    if name == "config":
        fields = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]
        return f"{option} ({', '.join(fields)})"
    if name == "data_sha256":
        return f"{option} (other puzzles, or another order)"
    return f"{option} (was {before!r}, now {now!r})"
