"""Why scaling does not help: named findings, each with its numbers and one piece of advice.

The rules are cautious. Trajectories of one puzzle are not independent, so puzzles are what is counted: a share is above
a threshold only if the lower end of its Wilson 95 % interval is, over as many trials as there are puzzles, and below
one only if the upper end is. Two ways of answering differ only by McNemar's exact test at 5 %. There are some twenty
rules and no correction for that: one finding in a report may be chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from eqr_kernels.studies.scaling import Scaling
from eqr_kernels.studies.statistics import Paired, wilson_interval

FEWEST_PUZZLES = 20
"""With fewer labelled puzzles nothing is concluded."""
FEWEST_RESTARTS = 4
"""With fewer restarts nothing is said of basins."""
FEWEST_STEPS = 16
"""With less depth nothing is said of trends."""
NOTABLE = 0.10
"""Share of puzzles or trajectories above which something is a finding."""
NEGLIGIBLE = 0.05
"""Share of puzzles below which a gain does not count, and of trajectories above which settling late is a finding."""
MAJORITY = 0.80
"""Share of puzzles in broad basins above which less compute would do."""
MISSED = 0.02
"""Share of puzzles that selection misses, of those that some restart has right, above which it is a finding."""
SIGNIFICANT = 0.05
"""Greatest p of McNemar's exact test."""
POOR_JUDGE = 0.80
"""AUROC below which the residual is a poor judge."""
AT_NOISE = 3.0
"""Times the floor expected of the noise, up to which a level is put down to noise."""


@dataclass(frozen=True)
class Finding:
    """name: which finding; evidence: its numbers, in a sentence; advice: what to do, in a sentence."""

    name: str
    evidence: str
    advice: str


def surely_above(share: float, trials: int, threshold: float) -> bool:
    """The Wilson 95 % interval of a share in so many trials lies above the threshold; a NaN is not."""
    return trials > 0 and share == share and wilson_interval(math.floor(share * trials + 1e-9), trials)[0] > threshold


def surely_below(share: float, trials: int, threshold: float) -> bool:
    """The Wilson 95 % interval of a share in so many trials lies below the threshold; a NaN is not."""
    return trials > 0 and share == share and wilson_interval(math.ceil(share * trials - 1e-9), trials)[1] < threshold


def auroc_upper(auroc: float, right: int, wrong: int) -> float:
    """Upper end of an AUROC's 95 % interval, over so many independent right and wrong ones; NaN if there are none.

    The standard error of Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic
    (ROC) curve", Radiology 143, 1982.
    """
    if not right or not wrong or auroc != auroc:
        return math.nan
    a, aa = auroc, auroc * auroc
    variance = a * (1 - a) + (right - 1) * (a / (2 - a) - aa) + (wrong - 1) * (2 * aa / (1 + a) - aa)
    return min(1.0, a + 1.96 * math.sqrt(max(0.0, variance) / (right * wrong)))


def advise(scaling: Scaling, *, tol: float) -> list[Finding]:
    """The findings, the gravest first; "nothing stands out" where there is none.

    Args:
        scaling: see `summarise`. tol: the residual that counted as settled.
    """
    findings = list(_flaws(scaling, tol))
    if scaling.labelled < FEWEST_PUZZLES:
        few = f"{scaling.labelled} puzzles with answers, and with fewer than {FEWEST_PUZZLES} nothing is concluded"
        return [
            *findings,
            Finding("too few puzzles", few, "Give more puzzles; a few hundred tell most of what there is."),
        ]
    findings += [
        *_tolerance(scaling, tol),
        *_basins(scaling),
        *_trajectories(scaling),
        *_depth(scaling),
        *_breadth(scaling),
        *_judge(scaling),
    ]
    if scaling.restarts < FEWEST_RESTARTS:
        findings.append(
            Finding(
                "too few restarts",
                f"breadth {scaling.restarts}; {FEWEST_RESTARTS} is the least that tells of basins",
                "Raise --breadth to see which basins a puzzle has.",
            )
        )
    if scaling.depths[-1] < FEWEST_STEPS:
        findings.append(
            Finding(
                "too shallow to tell trends",
                f"depth {scaling.depths[-1]}; {FEWEST_STEPS} is the least that tells of trends",
                "Raise --depth to see where trajectories go.",
            )
        )
    return findings or [
        Finding("nothing stands out", "no rule is met beyond doubt", "Give more puzzles, or read the tables.")
    ]


def _flaws(scaling: Scaling, tol: float) -> Iterator[Finding]:
    """What is a fault however few there are."""
    lost = sum(scaling.kinds["diverged"].values())
    if lost:
        yield Finding(
            "diverging",
            f"{lost} of {scaling.convergence.trajectories} trajectories became non-finite",
            "Check the weights and the precision (--precision fp32); more damping (a lower lambda_) in training.",
        )
    floor = scaling.convergence.expected_floor
    if tol < floor:
        yield Finding(
            "tolerance below the noise floor",
            f"the tolerance {tol:.3g} is below {floor:.3g}, the residual that the noise alone leaves",
            "Find one with `eqr calibrate`; with this one no trajectory ever halts.",
        )


def _kind(scaling: Scaling, kind: str) -> tuple[float, bool]:
    """Share of the trajectories, and whether it is notable beyond doubt."""
    share = sum(scaling.kinds[kind].values()) / scaling.convergence.trajectories
    return share, surely_above(share, scaling.puzzles, NOTABLE)


def _tolerance(scaling: Scaling, tol: float) -> Iterator[Finding]:
    c = scaling.convergence
    share, notable = _kind(scaling, "steady")
    if notable:
        at = (
            f"{_percent(share)} of the trajectories rest with one answer at a residual of {c.steady_level:.3g}, above "
            f"the tolerance {tol:.3g}; the noise alone leaves {c.expected_floor:.3g}"
        )
        if c.steady_level <= AT_NOISE * c.expected_floor:
            yield Finding(
                "noise floor above the tolerance", at, "Calibrate anew with `eqr calibrate`, or lower the noise."
            )
        else:
            yield Finding(
                "resting above the noise floor",
                at,
                "Compare with --precision fp32; if it stays, the state moves where no answer shows it: calibrate anew.",
            )
    loose = c.unsteady / c.settled if c.settled else math.nan
    if c.settled_puzzles >= FEWEST_PUZZLES and surely_above(loose, c.settled_puzzles, NOTABLE):
        yield Finding(
            "tolerance too loose",
            f"{_percent(loose)} of the settled trajectories changed their answer after they had met {tol:.3g}",
            "Give a lower --tol, or calibrate anew; what counts as settled here is not.",
        )


def _basins(scaling: Scaling) -> Iterator[Finding]:
    if scaling.restarts < FEWEST_RESTARTS:
        return
    m, counts = scaling.labelled, scaling.modes.counts().get("all", {})
    shares = {mode: count / m for mode, count in counts.items()}

    def of(mode: str) -> str:
        where = f"{scaling.restarts} restarts of depth {scaling.depths[-1]}"
        return f"{counts[mode]} of {m} puzzles ({_percent(shares[mode])}) by {where}"

    if surely_above(shares["no correct attractor"], m, NOTABLE):
        # Settled on a wrong answer there is an attractor, and it is the wrong one; else none was reached.
        ends = f"{_percent(scaling.settled_lost)} of their trajectories settled, on wrong answers"
        yield Finding(
            "no correct attractor",
            f"{of('no correct attractor')}; {ends if scaling.settled_lost else 'none of their trajectories settled'}",
            "Neither this depth nor this breadth finds an answer: train longer, larger, or on such puzzles.",
        )
    if surely_above(shares["competing"], m, NOTABLE):
        yield Finding(
            "competing",
            of("competing"),
            "Select by vote or q if the table shows that they do better; a lower lambda_ and more noise in training.",
        )
    if surely_above(shares["narrow"], m, NOTABLE):
        yield Finding("narrow", of("narrow"), "Raise the breadth; random starts and noise in training widen basins.")
    if surely_above(shares["broad"], m, MAJORITY):
        yield Finding(
            "broad and stable",
            f"{of('broad')}; of the trajectories that settle half do so by step {scaling.convergence.steps[0]:.0f} and "
            f"95 % by step {scaling.convergence.steps[1]:.0f}",
            "Lower depth and breadth, and let settled trajectories stop (halt by residual).",
        )


def _trajectories(scaling: Scaling) -> Iterator[Finding]:
    advice = {
        "wandering": "The tolerance does not fire for these: more damping (a lower lambda_) and noise in training "
        "shape the landscape; compare with --precision fp32.",
        "cycling": "More depth repeats itself: more damping (a lower lambda_), or noise to leave the cycle "
        "(--noise-scale).",
        "growing": "Less depth may be better: more damping (a lower lambda_) in training; compare with "
        "--precision fp32.",
    }
    for kind, what in advice.items():
        share, notable = _kind(scaling, kind)
        if notable:
            right = scaling.kinds[kind]["right"]
            often = (
                max(scaling.periods, key=lambda p: scaling.periods[p])
                if kind == "cycling" and scaling.periods
                else None
            )
            yield Finding(
                kind,
                f"{_percent(share)} of the trajectories at depth {scaling.depths[-1]}, {right} of them right"
                + (f"; the most common period is {often} steps" if often else ""),
                what,
            )


def _depth(scaling: Scaling) -> Iterator[Finding]:
    by, c = scaling.by_depth, scaling.convergence
    if by is None:
        return
    half, depth = max(1, scaling.depths[-1] // 2), scaling.depths[-1]
    late = c.late / c.open if c.open else math.nan
    seen = (
        f"from depth {half} to {depth} {_gains(by)}; of the {c.open} trajectories that had not settled by {half}, "
        f"{_percent(late)} did by {depth}"
    )
    falling, falls = _kind(scaling, "decaying")
    many = surely_above(c.late / c.trajectories, scaling.puzzles, NEGLIGIBLE)
    if by.p <= SIGNIFICANT and by.gained > by.lost or many or falls:
        fall = f"; {_percent(falling)} still fall" if falls else ""
        yield Finding("still converging", seen + fall, "Raise the depth.")
    elif by.p <= SIGNIFICANT and by.lost > by.gained:
        yield Finding("depth hurts", seen, "Let settled trajectories stop (halt by residual), or lower the depth.")
    elif surely_below(by.gained / by.puzzles, by.puzzles, NEGLIGIBLE):
        yield Finding("depth is used up", seen, f"Depth {half} does as well as {depth}: look at breadth, or train.")


def _breadth(scaling: Scaling) -> Iterator[Finding]:
    if scaling.restarts == 1:
        return
    by, oracle, m, b = scaling.by_breadth, scaling.oracle, scaling.labelled, scaling.restarts
    if by.p <= SIGNIFICANT and by.gained != by.lost:
        better = by.gained > by.lost
        yield Finding(
            "breadth pays" if better else "breadth hurts",
            f"from breadth 1 to {b} by residual {_gains(by)}",
            "Raise the breadth until that stops." if better else "Select by vote or q, or lower the breadth.",
        )
    if surely_below(oracle.gained / m, m, NEGLIGIBLE):
        yield Finding(
            "breadth has nothing to give",
            f"an oracle over {b} restarts answers {oracle.gained} more of {m} puzzles than the first restart alone",
            "Lower the breadth.",
        )
    missed = scaling.by_rule["any"]
    if surely_above(missed.gained / m, m, MISSED):
        rules = {name: row for name, row in scaling.by_rule.items() if name != "any"}
        best = max(rules, key=lambda name: rules[name].net)
        better = rules[best].net > 0 and rules[best].p <= SIGNIFICANT
        yield Finding(
            "selection loses to the oracle",
            f"by residual {100 * missed.gained / m:.1f} points fewer than if any right restart counted; by {best} "
            f"{_gains(rules[best])}",
            f"Select by {best}." if better else "No rule here does better beyond doubt; a better judge would.",
        )


def _judge(scaling: Scaling) -> Iterator[Finding]:
    right, wrong = scaling.mixed
    if min(right, wrong) < FEWEST_PUZZLES:
        return
    area = scaling.coupling.residual_auroc
    if auroc_upper(area, right, wrong) < POOR_JUDGE:
        yield Finding(
            "residual is a poor judge",
            f"AUROC {area:.3f} over {scaling.coupling.trajectories} trajectories; {right} puzzles have right ones, "
            f"{wrong} have wrong ones",
            "Select by vote or q, and do not take settling for being right; more noise in training couples the two.",
        )


def _gains(by: Paired) -> str:
    return f"{by.gained} puzzles are gained and {by.lost} lost of {by.puzzles} (p = {by.p:.2g})"


def _percent(share: float) -> str:
    return "none" if share != share else f"{100 * share:.1f} %"
