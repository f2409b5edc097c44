"""Which precision to take: a rule on the study's numbers, and the sentence that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MAX_LOSS = 0.01
MAX_LEFT = 0.02
_ZZ = 1.959963984540054**2


def judge(
    variant: dict[str, Any], control_left: float, *, max_loss: float = MAX_LOSS, max_left: float = MAX_LEFT
) -> str:
    """ "keeps", "loses" or "open".

    A trajectory has left its attractor when it settled in fp32, but here elsewhere or not at all; at most the control's
    share plus `max_left` may. "loses": the interval of the paired difference in accuracy lies below 0, or that of the
    share that left above what may. "keeps": the former excludes a loss greater than `max_loss`, and the share that left
    is no more than may. "open": neither; more puzzles would tell.

    Args:
        variant: with "paired" and "left_attractor", as in the study.
        control_left: share that leaves when only last bits change.
        max_loss, max_left: shares.
    """
    low, high = variant["paired"]["tango95"]
    left, most = variant["left_attractor"], control_left + max_left
    if high < 0 or left["wilson95"][0] > most:
        return "loses"
    # Nothing settled in fp32: there is no attractor to keep.
    stays = left["share"] is not None and left["share"] <= most
    return "keeps" if low > -max_loss and stays else "open"


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
    max_left: float = MAX_LEFT,
) -> str:
    """The cheapest variant that keeps accuracy and attractors, in words; the cheapest has the fewest bytes of weights.

    Of those that really run (not simulated), the one with the least time a step is named too.

    Args:
        variants: with "name", "verdict" (of `judge`), "simulated", "weight_bytes", "ms_per_step" and "paired".
        puzzles: on which the accuracies were compared.
    """
    kept = [variant for variant in variants if variant["verdict"] == "keeps"]
    stays = f"at most {100 * max_left:g} points more of what settled leaving its attractor than in jittered fp32"
    rule = f"no loss of more than {100 * max_loss:g} points, {stays}"
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
