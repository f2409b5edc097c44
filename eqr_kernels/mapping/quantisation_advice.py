"""Which precision to take: a rule on the study's numbers, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MAX_LOSS = 0.01
MAX_CHANGED = 0.02
_ZZ = 1.959963984540054**2


def judge(
    variant: dict[str, Any], control_changed: float, *, max_loss: float = MAX_LOSS, max_changed: float = MAX_CHANGED
) -> str:
    """ "keeps", "loses" or "open".

    "loses": the interval of the paired difference in accuracy lies below 0, or the share of trajectories that changed
    basin exceeds the control's by more than `max_changed`. "keeps": neither, and the interval excludes a loss greater
    than `max_loss`. "open": neither; more puzzles would tell.

    Args:
        variant: with "paired" and "changed_basin", as in the study.
        control_changed: share of trajectories that a change of the last bits alone moves to another basin.
        max_loss, max_changed: shares.
    """
    low, high = variant["paired"]["tango95"]
    if high < 0 or variant["changed_basin"]["share"] > control_changed + max_changed + 1e-12:
        return "loses"
    return "keeps" if low > -max_loss else "open"


def least_puzzles(max_loss: float) -> int:
    """Puzzles below which not even two equal runs exclude a loss greater than `max_loss`; see `tango_interval`."""
    if not 0 < max_loss < 1:
        raise ValueError(f"max_loss must be a share between 0 and 1, got {max_loss}")
    return math.floor(_ZZ * (1 - max_loss) / max_loss) + 1


def recommend(
    baseline_bytes: int,
    variants: Sequence[dict[str, Any]],
    puzzles: int,
    *,
    max_loss: float = MAX_LOSS,
    max_changed: float = MAX_CHANGED,
) -> str:
    """The cheapest variant that keeps accuracy and attractors, in words; the cheapest has the fewest bytes of weights.

    Of those that really run (not simulated), the one with the least time a step is named too.

    Args:
        variants: with "name", "verdict" (of `judge`), "simulated", "weight_bytes", "ms_per_step" and "paired".
        puzzles: on which the accuracies were compared.
    """
    kept = [variant for variant in variants if variant["verdict"] == "keeps"]
    changes = f"basin changes at most {100 * max_changed:g} points above those of jittered fp32"
    rule = f"no loss of more than {100 * max_loss:g} points, {changes}"
    if not kept:
        unsure = [v["name"] for v in variants if v["verdict"] == "open"]
        lost = [v["name"] for v in variants if v["verdict"] == "loses"]
        told = f"fp32: no other variant is shown to keep accuracy and attractors ({rule}) on {puzzles} puzzles"
        if unsure:
            told += f"; undecided: {', '.join(unsure)}"
            if puzzles < least_puzzles(max_loss):
                told += f" (even equal answers need {least_puzzles(max_loss)} puzzles)"
        return told + (f"; lost: {', '.join(lost)}." if lost else ".")
    best = min(kept, key=lambda v: (v["weight_bytes"], v["simulated"], v["name"]))
    told = f"By memory {best['name']}: {best['weight_bytes'] / baseline_bytes:.2f} of fp32's bytes, {_accuracy(best)}"
    timed = [v for v in kept if not v["simulated"] and v["ms_per_step"] is not None]
    if timed:
        fastest = min(timed, key=lambda v: v["ms_per_step"])
        told += f". By time {fastest['name']}: {fastest['ms_per_step']:.3g} ms a step"
        if fastest["times_as_fast"] is not None and fastest["name"] != "bf16":
            told += f", {fastest['times_as_fast']:.2f} times as fast as bf16"
        told += f", {_accuracy(fastest)}"
    return f"{told} ({rule}, on {puzzles} puzzles)."


def _accuracy(variant: dict[str, Any]) -> str:
    paired = variant["paired"]
    low, high = (100 * end for end in paired["tango95"])
    return f"{100 * paired['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
