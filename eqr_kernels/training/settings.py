"""What a training run is set to, and what a resumed run may change of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from eqr_kernels import ops
from eqr_kernels.cli.console import complain
from eqr_kernels.config import EqRConfig
from eqr_kernels.tasks.stream import parse_curriculum, same_clues
from eqr_kernels.training.cycles import parse_cycles, stretches
from eqr_kernels.training.recipes import COMMON, DECAY_END, DEFAULT_PRESET, FINE_TUNING, RECIPES

_OPTION_OF = {
    "lr_warmup_steps": "--warmup",
    "forward_dtype": "--dtype",
    "total_steps": "--steps",
    "config": "--preset and --set",
    "data_sha256": "the puzzles of --data",
    "processes": "the number of processes",
}


def settings_of(
    given: dict[str, Any], preset: str | None, stored: dict[str, Any], *, fine_tuning: bool = False
) -> dict[str, Any]:
    """Each setting as the command line says, else as the resumed run has it, else as the preset's recipe has it.

    The presets' recipes are for training from nothing, so fine-tuning has one of its own. A mix takes the place of the
    recipe's curriculum.
    """
    recipe = {**COMMON, **(FINE_TUNING if fine_tuning else RECIPES[preset or DEFAULT_PRESET])}
    if given["mix"]:
        recipe["curriculum"] = ""
    return {
        name: value if value is not None else stored[name] if name in stored else recipe[name]
        for name, value in given.items()
    }


def complete_schedule(
    settings: dict[str, Any], minutes: float | None, finish: float | None, lr_min_ratio: float | None
) -> None:
    """Completes the settings of a decay that is asked for.

    Raises:
        ValueError: nothing says when to stop, or where a decay ends.
    """
    total, begin, warmup = settings["total_steps"], settings["decay_from"], settings["lr_warmup_steps"]
    if total is None and minutes is None and finish is None:
        raise ValueError("nothing says when to stop; give --steps or --minutes")
    if begin is None and finish is None:
        if total is None and lr_min_ratio is not None and lr_min_ratio < 1:
            raise ValueError(f"--lr-min-ratio {lr_min_ratio:g} needs --steps, where the rate has come down")
        return
    if begin is not None and (total is None or total <= max(begin, warmup)):
        raise ValueError(
            f"--decay-from {begin} needs --steps beyond it and beyond the warm-up of {warmup}, where the rate has come "
            f"down, got {total}"
        )
    if settings["lr_min_ratio"] >= 1:
        if lr_min_ratio is not None:
            raise ValueError(f"--lr-min-ratio must be below 1 for the rate to fall, got {lr_min_ratio:g}")
        settings["lr_min_ratio"] = DECAY_END


def check_resumed(stored: dict[str, Any], settings: dict[str, Any], how: dict[str, bool], run: str, step: int) -> None:
    """Refuses to continue a run with other settings, which would give another result than the run it continues.

    Args:
        stored: what the run was set to when it was saved, at `step`.
        run: names it in messages.

    Raises:
        ValueError: a setting that both have differs.
    """
    # They only say when to stop, and where the rate will fall, unless it has begun to.
    schedule = {"total_steps", "decay_from", "lr_min_ratio"}
    begun = any(decay_begins(some) < step for some in (stored, settings))
    free = set() if begun else schedule
    if stored.get("slice_steps") is None:  # the run was stopped before its speed was measured
        free.add("slice_steps")
    free |= _same_so_far(stored, settings, step)
    differ = [name for name in settings if name in stored and stored[name] != settings[name] and name not in free]
    if differ:
        differences = "; ".join(_difference(name, stored[name], settings[name]) for name in differ)
        raise ValueError(f"{run} goes on with its own settings, and these differ: {differences}")
    missing = sorted(name for name in settings if name not in stored)
    if missing:
        names = ", ".join(missing)
        complain(f"{run} does not say {names}; taken from the command line and the preset", "warning")
    for name, value in how.items():
        # A state from before there was a fused kernel was trained without.
        if stored.get(name, name != "fused") != value:
            option = f"--{name}" if value else f"--no-{name}"
            complain(f"{option} is not as before: the result equals an uninterrupted run's to rounding only", "warning")


def _same_so_far(stored: dict[str, Any], settings: dict[str, Any], step: int) -> set[str]:
    """Which of the schedules by step may differ, as they agree on all steps that are done."""

    def cycles(some: dict[str, Any]) -> Any:
        return stretches(parse_cycles(some.get("cycles", "")), EqRConfig.from_dict(some["config"]), step)

    def curriculum(some: dict[str, Any]) -> Any:
        return parse_curriculum(some["curriculum"]) if some["curriculum"] else ()

    same = {"cycles"} if cycles(stored) == cycles(settings) else set()
    if "curriculum" in stored and same_clues(curriculum(stored), curriculum(settings), step):
        same.add("curriculum")
    return same


def decay_begins(settings: dict[str, Any]) -> float:
    """The step from which on the rate falls; infinity where it does not."""
    if settings["lr_min_ratio"] >= 1 or settings["total_steps"] is None:
        return math.inf
    begin = settings.get("decay_from")
    return float(settings["lr_warmup_steps"] if begin is None else begin)


def machine(stored: dict[str, Any], kernel: str) -> dict[str, Any]:
    """What trains here, as far as it decides last bits; warns where that is not what trained `stored`."""
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
