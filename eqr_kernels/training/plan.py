"""What a training run is to be, from what was asked for, from the run that it continues and from the recipes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks.registry import choose_task, find_task, is_object, task_of
from eqr_kernels.tasks.stream import parse_curriculum
from eqr_kernels.tasks.task import Reveals, Task
from eqr_kernels.training.initial_weights import InitialWeights, initial_weights
from eqr_kernels.training.processes import Process
from eqr_kernels.training.recipes import DEFAULT_PRESET, PRESETS, RENAMED
from eqr_kernels.training.record import RunRecord
from eqr_kernels.training.resume import copy_to_anneal
from eqr_kernels.training.settings import TrainSettings, choose_settings, complete_schedule
from eqr_kernels.training.state import has_state, read_manifest


@dataclass(frozen=True)
class RunRequest:
    """What is asked of `eqr train`.

    Attributes:
        out: folder of the run.
        options: fields of `TrainSettings`; None leaves one to the run that is resumed, and to the recipe.
        preset: of `PRESETS`, names config and recipe.
        config_fields: fields of `EqRConfig` that differ from them.
        task: to train on, as `tasks.registry.find_task` takes it; None goes by the run or checkpoint that is continued,
            else by the config.
        init: checkpoint to start from, as `initial_weights` takes it.
        resume: continue the run in `out`.
        minutes: that may be spent.
        finish: minutes in which a copy of the run in `out` is annealed.
    """

    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    config_fields: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    init: str | None = None
    resume: bool = False
    minutes: float | None = None
    finish: float | None = None

    def __post_init__(self) -> None:
        for name in ("minutes", "finish"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be positive, got {value:g}")
        if self.preset in RENAMED:
            preset, fields, note = RENAMED[self.preset]
            warnings.warn(f"--preset {self.preset} {note}", stacklevel=2)
            object.__setattr__(self, "preset", preset)
            object.__setattr__(self, "config_fields", {**fields, **self.config_fields})
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.init is not None and self.resume:
            raise ValueError(
                "--init starts a new run and --resume continues one with its own weights; give one of them"
            )
        if self.init is not None and self.options.get("attention_init") is not None:
            raise ValueError(
                "--attention-init is how weights are drawn, and --init starts from weights that are there; give one"
            )
        if self.finish is not None:
            self._check_finish()

    def _check_finish(self) -> None:
        """Raises a ValueError where --finish is given with what it decides itself."""
        decided = {
            "--resume": self.resume or None,
            "--init": self.init,
            "--preset": self.preset,
            "--set": self.config_fields or None,
            "--minutes": self.minutes,
            "--steps": self.options.get("total_steps"),
            "--decay-from": self.options.get("decay_from"),
        }
        wrong = [option for option, value in decided.items() if value is not None]
        if wrong:
            raise ValueError(
                "--finish anneals a copy of the run in --out, and decides where that begins and ends; leave out "
                + ", ".join(wrong)
            )


@dataclass(frozen=True)
class RunPlan:
    """A run that can be begun or continued.

    Attributes:
        out: folder of its state and its model.
        task, config, settings: what is trained, and how.
        task_object: where the task was found, of one that has to be found again by its place (`ModelCard.task_object`).
        initial: weights that it starts from; None draws them by the seed.
        stored: the run that it continues, as that was saved at `step`; None for a new one.
    """

    out: Path
    task: Task
    config: EqRConfig
    settings: TrainSettings
    initial: InitialWeights | None = None
    stored: RunRecord | None = None
    step: int = 0
    task_object: str = ""


def plan_run(request: RunRequest, process: Process) -> RunPlan:
    """The run that is asked for; with `finish` the copy to anneal is made.

    Raises:
        FileNotFoundError, RuntimeError: there is no run to continue, or its state is of another format.
        ImportError: the task cannot be imported.
        TypeError, ValueError: the request makes no sense, or not for the run that is there.
    """
    out, goes_on = request.out, request.resume or request.finish is not None
    if not goes_on and has_state(out):
        raise ValueError(f"--out {out} holds a run already; continue it with --resume, or name another folder")
    if request.finish is not None:
        out = copy_to_anneal(out, process)
    stored, step = None, 0
    if goes_on:
        manifest = read_manifest(out)
        stored, step = RunRecord.from_json(manifest["settings"]), int(manifest["step"])
    initial = None
    if request.init is not None:
        preset = None if request.preset is None else _config(request.preset, {})
        initial = initial_weights(request.init, dict(request.config_fields), preset)
    wanted = None if request.task is None else find_task(request.task)
    remembered = {"name": "", "place": ""}
    if stored is not None:
        remembered = {"name": stored.task, "place": stored.task_object}
    if initial is not None:
        config = initial.config
        remembered = {"name": initial.task, "place": initial.task_object}
    elif stored is not None and request.preset is None:
        config = EqRConfig.from_dict({**stored.config.to_dict(), **request.config_fields})
    else:
        config = _config(request.preset or DEFAULT_PRESET, {**_sizes_of(wanted), **request.config_fields})
    task = choose_task(wanted, config, **remembered)
    fields = choose_settings(
        request.options,
        request.preset,
        {} if stored is None else stored.stored_settings,
        fine_tuning=initial is not None,
        own_task=task is task_of(_config(request.preset or DEFAULT_PRESET, {})),
    )
    if request.finish is not None:
        fields |= {"total_steps": None, "decay_from": None}
    fields = complete_schedule(fields, request.minutes, request.finish, request.options.get("lr_min_ratio"))
    # They decide the last bits of the fused step's gradients, whatever the threads of a resumed run.
    fields["workers"] = fields.get("workers") or process.agree(torch.get_num_threads())
    settings = TrainSettings(**fields)
    if settings.curriculum and not isinstance(task, Reveals):
        raise ValueError(
            f"--curriculum is for Sudoku and tasks with a `reveal`, and the run trains the {task.name} task; "
            'set it to ""'
        )
    most = max(point.high for point in parse_curriculum(settings.curriculum)) if settings.curriculum else 0
    if most > config.seq_len:
        raise ValueError(f"--curriculum shows up to {most} clues, and a puzzle has {config.seq_len} cells")
    task_object = request.task if request.task is not None and is_object(request.task) else ""
    return RunPlan(out, task, config, settings, initial, stored, step, task_object)


def _sizes_of(task: Task | None) -> dict[str, int]:
    """The fields of a config that the task decides."""
    sizes = {} if task is None else {"seq_len": task.seq_len, "vocab_size": task.vocab_size}
    return {name: size for name, size in sizes.items() if size is not None}


def _config(preset: str, fields: Mapping[str, Any]) -> EqRConfig:
    config: EqRConfig = getattr(EqRConfig, PRESETS[preset])(**fields)
    return config
