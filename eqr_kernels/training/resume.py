"""Continuing a training run: what may be changed of it, and the copy of it that is annealed."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from eqr_kernels.tasks.stream import RevealPoint, parse_curriculum, same_clues
from eqr_kernels.training.cycles import parse_cycles, stretches
from eqr_kernels.training.processes import Process
from eqr_kernels.training.record import RunRecord
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.state import copy_state, has_state, read_manifest

_log = logging.getLogger(__name__)

_OPTION_OF = {
    "lr_warmup_steps": "--warmup",
    "forward_dtype": "--dtype",
    "total_steps": "--steps",
    "config": "--preset and --set",
    "data_sha256": "the puzzles of --data",
    "processes": "the number of processes",
}
_SCHEDULE = {"total_steps", "decay_from", "lr_min_ratio"}
"""They only say when to stop, and where the rate will fall, unless it has begun to."""
_HOW = ("compile", "fused")
"""They decide last bits alone."""


def check_resumed(before: RunRecord, now: RunRecord, run: str, step: int) -> None:
    """Refuses to continue a run with other settings, which would give another result than the run it continues.

    Args:
        before: the run as it was saved, at `step`.
        now: the run as it would go on.
        run: names it in messages.

    Raises:
        ValueError: a setting that both have differs.
    """
    begun = any(settings.decay_begins < step for settings in (before.settings, now.settings))
    free = set() if begun else set(_SCHEDULE)
    if before.settings.slice_steps is None:  # the run was stopped before its speed was measured
        free.add("slice_steps")
    free |= _same_so_far(before, now, step) | before.unsaid
    if not before.task:  # not said by a manifest of before there were any
        free.add("task")
    old, new = _compared(before), _compared(now)
    differ = [name for name in new if name not in free and old[name] != new[name]]
    if differ:
        differences = "; ".join(_difference(name, old[name], new[name]) for name in differ)
        raise ValueError(f"{run} goes on with its own settings, and these differ: {differences}")
    defaults = TrainSettings().to_json()
    unsaid = sorted(name for name in before.unsaid if name in new and new[name] != defaults[name])
    if unsaid:
        _log.warning("%s does not say %s; taken from the command line and the preset", run, ", ".join(unsaid))
    for name in _HOW:
        value = getattr(now.settings, name)
        if getattr(before.settings, name) != value:
            option = f"--{name}" if value else f"--no-{name}"
            _log.warning("%s is not as before: the result equals an uninterrupted run's to rounding only", option)


def check_machine(before: RunRecord, now: RunRecord) -> None:
    """Warns where what trains is not what trained before."""
    for name, value in now.machine.items():
        old = before.machine.get(name, value)
        if old != value:
            effect = "is another one, of other random numbers" if name == "kernel" else "differs in its last bits"
            _log.warning("%s was %r, now %r: the result %s", name, old, value, effect)


def _compared(record: RunRecord) -> dict[str, Any]:
    """What must stay the same."""
    settings = {name: value for name, value in record.settings.to_json().items() if name not in _HOW}
    return settings | {
        "config": record.config.to_dict(),
        "data_sha256": record.data_sha256,
        "processes": record.processes,
        "task": record.task,
    }


def _same_so_far(before: RunRecord, now: RunRecord, step: int) -> set[str]:
    """Which of the schedules by step may differ, as they agree on all steps that are done."""

    def cycles(run: RunRecord) -> Any:
        return stretches(parse_cycles(run.settings.cycles), run.config, step)

    def curriculum(run: RunRecord) -> tuple[RevealPoint, ...]:
        return parse_curriculum(run.settings.curriculum) if run.settings.curriculum else ()

    same = {"cycles"} if cycles(before) == cycles(now) else set()
    if same_clues(curriculum(before), curriculum(now), step):
        same.add("curriculum")
    return same


def _difference(name: str, before: Any, now: Any) -> str:
    option = _OPTION_OF.get(name, "--" + name.replace("_", "-"))
    if name == "config":
        fields = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]
        return f"{option} ({', '.join(fields)})"
    if name == "data_sha256":
        return f"{option} (other puzzles, or another order)"
    return f"{option} (was {before!r}, now {now!r})"


def copy_to_anneal(out: Path, process: Process) -> Path:
    """Copies the newest state of the run in `out` to `out/annealed-STEP`, where there is none yet; that folder.

    The run in `out` is only read, and may be going on.

    Raises:
        FileNotFoundError: there is no run in `out`.
        ValueError: its rate has not come up yet, or has begun to fall, or the copy has been annealed already.
    """
    step = process.agree(_copy_newest(out) if process.rank == 0 else 0)
    target = out / f"annealed-{step:09d}"
    if TrainSettings.from_json(read_manifest(target)["settings"]).decay_begins < math.inf:
        raise ValueError(
            f"--finish: {target} has been begun; continue it with --out {target} --resume, or move it away"
        )
    return target


def _copy_newest(out: Path) -> int:
    """Makes the copy; its step."""
    read_manifest(out)
    copy = Path(tempfile.mkdtemp(prefix="annealing-", dir=out))
    try:
        copy_state(out, copy)
        manifest = read_manifest(copy)
        step, settings = int(manifest["step"]), TrainSettings.from_json(manifest["settings"])
        warmup, begins = settings.lr_warmup_steps, settings.decay_begins
        if step < warmup:
            raise ValueError(f"--finish: the run in {out} is at step {step} of its warm-up of {warmup}; train on first")
        if begins < math.inf:
            raise ValueError(
                f"--finish: the run in {out} lets its rate fall from step {begins:.0f} on; continue it with --resume"
            )
        streams, target = out / "ranks" / f"step-{step:09d}", out / f"annealed-{step:09d}"
        if streams.is_dir():
            shutil.copytree(streams, copy / "ranks" / streams.name)
        if not has_state(target):
            shutil.rmtree(target, ignore_errors=True)
            copy.rename(target)
        return step
    finally:
        shutil.rmtree(copy, ignore_errors=True)
