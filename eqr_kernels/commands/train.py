"""`eqr train`: what a run is made of; `training_run` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eqr_kernels.commands import options as opt
from eqr_kernels.commands.console import INTERRUPTED, busy, command, complain

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
# The averages forget where they started in a few hundred steps, as a short run needs.
_FINE_TUNING: dict[str, Any] = dict(
    batch_size=96, lr=1e-4, lr_warmup_steps=100, total_steps=None, curriculum="", ema_rate=0.99
)
# On a CPU attention has no fused kernel in bfloat16, and PyTorch's is slow without instructions for it.
RECIPES = {"sudoku": {**_PUBLISHED, "forward_dtype": "bfloat16"}, "sudoku-small": _SMALL, "maze": _PUBLISHED}
"""The schedule of each preset, where the command line does not say otherwise."""

_PRESETS = {"sudoku": "sudoku", "sudoku-small": "sudoku_small", "maze": "maze"}
_PRESET = "sudoku-small"
_COMMON: dict[str, Any] = dict(lr_min_ratio=1.0, weight_decay=1.0, ema_rate=0.999, forward_dtype="float32", seed=0,
                               slice_steps=None)  # fmt: skip
_OPTION_OF = {
    "lr_warmup_steps": "--warmup", "forward_dtype": "--dtype", "total_steps": "--steps", "config": "--preset and --set",
    "data_sha256": "the puzzles of --data", "processes": "the number of processes",
}  # fmt: skip


@command
def train(
    data: Annotated[str, typer.Option(help="Puzzles with answers, in any form that `eqr solve` reads.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: its state, and the averaged weights with their card.")],
    preset: Annotated[str | None, typer.Option(help="sudoku, sudoku-small or maze.", show_default=_PRESET)] = None,
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
        float | None, typer.Option(help="Share of --lr where a cosine ends; 1 keeps it constant.", show_default="1")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamATan2.", show_default="1")] = None,
    ema_rate: Annotated[float | None, typer.Option(help="Of the averaged weights.", show_default="0.999")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps in all.", show_default="the preset's")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop at the last slice's end within this time.")] = None,
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
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to OUT/tensorboard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as one JSON object a line.")] = False,
) -> int:
    """Train a model, resumably to the same result; Ctrl-C saves and stops.

    Training goes in slices, and each ends with a save, so a run that is killed loses one slice at most. A run that
    stops at the end of a slice (as with --minutes) and is resumed equals an uninterrupted one bit for bit. A stop in
    between (Ctrl-C; --steps or --minutes that end sooner) adds a save, so the result is another, though as good.

    OUT gets the state of the run, and model.safetensors with model.json: the averaged weights, as `--model OUT` of the
    other commands takes them. torchrun starts one process a device, each with rows and puzzles of its own.

    --init starts a new run from weights that were trained before, with the config that came with them; --set changes
    what they do not depend on. A TRM (a fixed start) becomes an EqR: fixed_init=false, lambda_=0.95, noise_scale=0.01,
    where --set does not say otherwise. The schedule is then batch size 96, --lr 1e-4, --warmup 100, --ema-rate 0.99 and
    no curriculum.

    A report ends with the samples a second, the operations a second of their matrix products, and what share that is of
    the rate of big matrix products (torch.matmul in --dtype), which is measured as the run starts.

    Exit code 0: the steps or minutes are done; 2: nothing could be done; 130: interrupted, and saved.
    """
    given = dict(
        batch_size=batch_size, lr=lr, lr_warmup_steps=warmup, lr_min_ratio=lr_min_ratio, weight_decay=weight_decay,
        ema_rate=ema_rate, total_steps=steps, curriculum=curriculum, seed=seed, forward_dtype=dtype,
        slice_steps=slice_steps,
    )  # fmt: skip
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes must be positive, got {minutes:g}")
    if init is not None and resume:
        raise ValueError("--init starts a new run and --resume continues one with its own weights; give one of them")
    stored = _stored(out, resume)
    with busy("loading torch"):
        import torch

        from eqr_kernels.commands import training_logs as logging
        from eqr_kernels.commands import training_run as running
        from eqr_kernels.commands.puzzles import SUDOKU, task_of
        from eqr_kernels.evaluation import digest
    start = None if init is None else _initial_weights(init, preset, changes or [])
    config = _config(preset, changes or [], stored) if start is None else start.config
    settings = _settings(given, preset, stored, fine_tuning=start is not None)
    if settings["total_steps"] is None and minutes is None:
        raise ValueError("nothing says when to stop; give --steps or --minutes")
    task = task_of(config)
    if settings["curriculum"] and task is not SUDOKU:
        raise ValueError(f'--curriculum is for Sudoku, and the config is one of the {task.name} task; set it to ""')
    with busy(f"reading {data}"):
        puzzles = _training_puzzles(task, config, data)
    assert puzzles.labels is not None
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
        _compare(stored, settings, how, out)
        settings |= how
        run = running.TrainingRun(
            task, puzzles, config, settings, out, process, data=Path(data).name,
            initial=None if start is None else start.state_dict,
        )  # fmt: skip
        settings |= _machine(stored, run.trainer.kernel)
        if resume:
            run.load()
        elif process.rank == 0:
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
        interrupted = run.train(minutes, log_every, logs)
    step = run.trainer.step
    between = "" if run.at_boundary else " (not bit for bit as if it had gone on, since no slice ended there)"
    if interrupted:
        complain(f"interrupted at step {step}; the state is saved, and --resume continues it{between}", "note")
        return INTERRUPTED
    if between and step != settings["total_steps"] and process.rank == 0:
        complain(f"time was over at step {step}; the state is saved, and --resume continues it{between}", "note")
    return 0


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

    puzzles, errors = with_answers(*read_puzzles(task, config.seq_len, data, split=_split(data)), task)
    if errors:
        raise ValueError(f"{data}: {len(errors)} rows cannot be trained on, the first on {errors[0]}; remove them")
    return puzzles


def _split(data: str) -> str | None:
    return "train" if all((Path(data) / name).is_dir() for name in ("train", "test")) else None


def _compare(stored: dict[str, Any], settings: dict[str, Any], how: dict[str, bool], out: Path) -> None:
    """Refuses to resume a run with other settings, which would give another result than the run it continues.

    Raises:
        ValueError: a setting that both have differs.
    """
    if not stored:
        return
    # Steps only say when to stop, unless the learning rate falls towards them.
    free = {"total_steps"} if settings["lr_min_ratio"] >= 1 else set()
    if stored.get("slice_steps") is None:  # the run was stopped before its speed was measured
        free.add("slice_steps")
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
