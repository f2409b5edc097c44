"""Which precision to take: a rule on the study's numbers, and the text that says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eqr_kernels.studies.statistics import Z95

MAX_LOSS = 0.01
MAX_ATTRACTORS_LOST = 0.01


def judge(
    variant: dict[str, Any], *, max_loss: float = MAX_LOSS, max_attractors_lost: float = MAX_ATTRACTORS_LOST
) -> str:
    """ "keeps", "loses" or "open".

    Only right answers count: a model may rest on many wrong ones, and which of these is no loss. Three intervals are
    of gains and losses: of the answers that are selected; of the trajectories that are right; and of those that are
    right in fp32 and stay so, less what stays right under another seed. The fourth is of the attractors of right
    answers that are gone when the variant starts at fp32's fixed points. "loses": one of the three lies below no loss
    at all, or the fourth above its limit. "keeps": each of the three excludes a loss beyond the limit, and the share of
    attractors is within its own. "open": neither, or one of them was not measured.

    Args:
        variant: with "paired", "trajectories", "right_kept" and "displacement", as in the study.
        max_loss, max_attractors_lost: shares; the first is the limit of the first three.
    """
    compared = [variant["trajectories"], variant["right_kept"]]
    intervals = [variant["paired"]["tango95"], *(one["interval95"] for one in compared if one is not None)]
    gone = None if variant["displacement"] is None else variant["displacement"]["from_fixed_point"]["lost"]
    if any(high < 0 for _, high in intervals) or (gone is not None and gone["wilson95"][0] > max_attractors_lost):
        return "loses"
    if any(one is None for one in compared) or gone is None or gone["share"] is None:
        return "open"
    within = all(low > -max_loss for low, _ in intervals) and gone["share"] <= max_attractors_lost
    return "keeps" if within else "open"


def least_puzzles(max_loss: float) -> int:
    """Puzzles below which not even two equal runs exclude a loss greater than `max_loss`; see `tango_interval`."""
    if not 0 < max_loss < 1:
        raise ValueError(f"max_loss must be a share between 0 and 1, got {max_loss}")
    return math.floor(Z95**2 * (1 - max_loss) / max_loss) + 1


def recommend(
    baseline_bytes: int,
    variants: Sequence[dict[str, Any]],
    puzzles: int,
    *,
    max_loss: float = MAX_LOSS,
    max_attractors_lost: float = MAX_ATTRACTORS_LOST,
) -> str:
    """The cheapest variant that keeps accuracy and attractors, in words; the cheapest has the fewest bytes of weights.

    Of those that really run (not simulated), the one with the least time a step is named too.

    Args:
        variants: with "name", "verdict" (of `judge`), "simulated", "weight_bytes", "ms_per_step", "paired".
        puzzles: on which the accuracies were compared.
    """
    kept = [variant for variant in variants if variant["verdict"] == "keeps"]
    rule = (
        f"a loss of over {100 * max_loss:g} points excluded, of answers, of trajectories, and of those that another "
        f"seed keeps right; at most {100 * max_attractors_lost:g} % attractors lost"
    )
    if not kept:
        unsure = [v["name"] for v in variants if v["verdict"] == "open"]
        lost = [v["name"] for v in variants if v["verdict"] == "loses"]
        text = f"fp32: nothing else is shown to keep accuracy and attractors on {puzzles} puzzles ({rule})"
        if unsure:
            text += f"; undecided: {', '.join(unsure)}"
            if puzzles < least_puzzles(max_loss):
                text += f" (even equal answers need {least_puzzles(max_loss)} puzzles)"
        return text + (f"; lost: {', '.join(lost)}." if lost else ".")
    best = min(kept, key=lambda v: (v["weight_bytes"], v["simulated"], v["name"]))
    text = f"By memory {best['name']}: {best['weight_bytes'] / baseline_bytes:.2f} of fp32's bytes, {_accuracy(best)}"
    timed = [v for v in kept if not v["simulated"] and v["ms_per_step"] is not None]
    if timed:
        fastest = min(timed, key=lambda v: v["ms_per_step"])
        text += f". By time {fastest['name']}: {fastest['ms_per_step']:.3g} ms a step"
        if fastest["times_as_fast"] is not None and fastest["name"] != "bf16":
            text += f", {fastest['times_as_fast']:.2f} times as fast as bf16"
        text += f", {_accuracy(fastest)}"
    return f"{text} ({rule}, on {puzzles} puzzles)."


def _accuracy(variant: dict[str, Any]) -> str:
    paired = variant["paired"]
    low, high = (100 * end for end in paired["tango95"])
    return f"{100 * paired['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]"
