"""Do the attractors of a model outlive the rounding of its weights and activations?

Every variant runs the same puzzles from the same starts with the same noise as fp32 does, so that trajectories are
compared one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.studies.quantisation import runs
from benchmarks.studies.quantisation.advice import MAX_ATTRACTORS_LOST, MAX_LOSS, judge, recommend
from benchmarks.studies.quantisation.cost import time_precisions
from benchmarks.studies.quantisation.displacement import Probe
from benchmarks.studies.quantisation.fake import Rounded, with_rounded_weights
from benchmarks.studies.quantisation.straying import Straying
from benchmarks.studies.quantisation.variants import (
    BASELINE,
    RESEEDED,
    Variant,
    default_variants,
    sort_out,
    weight_bytes,
)
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.types import Progress

PROBE_DEPTHS = 4
"""How many times as deep as the study the trajectories go whose displacement is measured, to be at their fixed points.
Without noise they come ever closer, and a slow mode takes longer than the tolerance does."""
DISPLACED = 32
"""Puzzles on which displacement is measured, at most."""
_UNTIMED = {"ms_per_step": None, "times_as_fast": None}


def study(
    model: EquilibriumReasoner,
    inputs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    depth: int,
    breadth: int,
    tol: float | Mapping[str, float],
    seed: int = 0,
    progress: Progress | None = None,
    variants: Sequence[Variant] | None = None,
    noise_scale: float | None = None,
    backend: str = "auto",
    slots: int | None = None,
    displaced: int = DISPLACED,
    rounds: int = 7,
    max_loss: float = MAX_LOSS,
    max_attractors_lost: float = MAX_ATTRACTORS_LOST,
) -> dict[str, Any]:
    """Accuracy, residuals, basins, displacement and cost of each variant against fp32; a dict that is ready for JSON.

    Args:
        model: any precision; it is copied, and its weights are taken as float32.
        inputs, labels: integers [N, S]; each puzzle with some label, and a label of 0 is not scored.
        depth, breadth: outer steps of each trajectory, all spent, and trajectories of each puzzle.
        tol: residual that counts as settled; or that of each precision, by its name.
        seed: of starts and noise, the same for all.
        progress: called with (outer steps spent, outer steps in all); displacement and timing are not counted.
        variants: to compare with fp32, by default `default_variants()`. Controls are told apart, and the reseeded one,
            which the verdicts need, is always among them.
        noise_scale: None takes the card's, else the config's.
        backend, slots: as for `solve`.
        displaced: puzzles, settled and right in fp32, for the displacement, and any, for the straying, spread evenly; 0
            measures neither, and leaves every verdict open that loses nothing.
        rounds: of the timing; 0 measures none.
        max_loss, max_attractors_lost: of the recommendation, see `judge`.

    Raises:
        ValueError: shapes, labels or numbers do not fit; as `solve`. RuntimeError: fp32 cannot run on this backend.
    """
    questions, answers = _checked(inputs, labels)
    if noise_scale is None:
        noise_scale = model.inference_noise_scale
    limits = dict(max_loss=max_loss, max_attractors_lost=max_attractors_lost)
    options: dict[str, Any] = dict(seed=seed, noise_scale=noise_scale, backend=backend, slots=slots)
    base_model, _ = with_rounded_weights(model, None)
    requested = list(default_variants() if variants is None else variants)
    if RESEEDED not in requested:
        requested.insert(0, RESEEDED)
    tols = _tolerances(tol, {BASELINE.precision, *(variant.precision for variant in requested)})
    wanted, missing = sort_out(base_model, requested, backend)
    each, total = len(questions) * depth * breadth, (1 + len(wanted)) * len(questions) * depth * breadth

    def measured(number: int, changed: EquilibriumReasoner, variant: Variant) -> runs.Run:
        def shown(spent: int, _of: int) -> None:
            if progress is not None:
                progress(number * each + spent, total)

        return runs.run(
            changed,
            questions,
            answers,
            depth=depth,
            breadth=breadth,
            tol=tols[variant.precision],
            precision=variant.precision,
            progress=shown,
            **{**options, "seed": (seed + variant.reseeded) % 2**32},
        )

    base = measured(0, base_model, BASELINE)
    reseeded = measured(1, base_model, RESEEDED)
    rows = _spread(np.flatnonzero(base.settled[:, 0] & base.ended_right[:, 0]), displaced)
    probe = None
    if len(rows):
        tokens = torch.from_numpy(questions[rows].astype(np.int64))
        probe = Probe(base_model, tokens, depth=PROBE_DEPTHS * depth, tol=tols["fp32"], seed=seed)
    straying = None
    if displaced:
        some = torch.from_numpy(questions[_spread(np.arange(len(questions)), displaced)].astype(np.int64))
        straying = Straying(base_model, some, depth=depth, seed=seed, noise_scale=noise_scale)
    measurements, numbers = [], itertools.count(2)
    for variant in wanted:
        changed, rounded = with_rounded_weights(model, variant.rounding)
        row = _named(variant, changed, rounded)
        if variant.reseeded:
            row |= {**runs.alone(reseeded), **runs.against(base, reseeded)}
            row |= {"right_kept": None, "displacement": None, "straying": None}  # of the same starts alone
        else:
            here = measured(next(numbers), changed, variant)
            row |= {**runs.alone(here), **runs.against(base, here), "right_kept": runs.right_kept(base, reseeded, here)}
            how = changed, variant.precision, tols[variant.precision]
            row["displacement"] = None if probe is None else probe.measure(*how)
            row["straying"] = None if straying is None else straying.measure(changed, variant.precision)
        measurements.append(row)
    timed = _times(base_model, questions, wanted, rounds, options)
    baseline = {
        **_named(BASELINE, base_model, {}),
        **runs.alone(base),
        "spread": None if probe is None else probe.spread(noise_scale),
        "straying": None if straying is None else straying.under_other_noise(),
        **timed.get(BASELINE.precision, _UNTIMED),
    }
    for row in measurements:
        row |= _UNTIMED if row["simulated"] or row["control"] else timed.get(row["precision"], _UNTIMED)
    compared = [row for row in measurements if not row["control"]]
    for row in compared:
        row["verdict"] = judge(row, **limits)
    return {
        "depth": depth,
        "breadth": breadth,
        "puzzles": len(questions),
        "tol": tols["fp32"],
        "seed": seed,
        "noise_scale": noise_scale,
        "rule": limits,
        "baseline": baseline,
        "control": [row for row in measurements if row["control"]],
        "variants": compared,
        "not_available": missing,
        "recommendation": recommend(baseline["weight_bytes"], compared, len(questions), **limits),
    }


def _checked(inputs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    questions, answers = np.asarray(inputs), np.asarray(labels)
    if questions.ndim != 2 or not len(questions) or questions.shape != answers.shape:
        raise ValueError(
            f"inputs and labels must both be [N >= 1, S], got shapes {questions.shape} and {answers.shape}"
        )
    bare = np.flatnonzero(~answers.any(1))
    if len(bare):
        raise ValueError(
            f"every puzzle must have labels, got none in {len(bare)} rows, first {bare[0]}; leave them out"
        )
    return questions, answers


def _tolerances(tol: float | Mapping[str, float], precisions: set[str]) -> dict[str, float]:
    given = tol if isinstance(tol, Mapping) else dict.fromkeys(precisions, tol)
    if missing := sorted(precisions - given.keys()):
        raise ValueError(f"tol must have one of each precision, got none of {', '.join(missing)}")
    for name in precisions:
        if not 0 < given[name] < math.inf:
            raise ValueError(f"tol must be positive and finite, got {given[name]} of {name}")
    return {name: given[name] for name in precisions}


def _spread(rows: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    """At most `count` of the rows, evenly: a file may be sorted by source."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))] if len(rows) else rows


def _named(variant: Variant, model: EquilibriumReasoner, rounded: dict[str, Rounded]) -> dict[str, Any]:
    return {
        "name": variant.name,
        "what": variant.what,
        "precision": variant.precision,
        "simulated": variant.simulated,
        "control": variant.control,
        "weight_bytes": weight_bytes(model, variant, rounded),
        "groups": {name: one.group for name, one in rounded.items() if one.group is not None},
    }


def _times(
    model: EquilibriumReasoner,
    questions: npt.NDArray[np.integer],
    wanted: Sequence[Variant],
    rounds: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    if not rounds:
        return {}
    precisions = dict.fromkeys([BASELINE.precision, *(v.precision for v in wanted if not v.simulated)])
    return time_precisions(
        model, torch.from_numpy(questions.astype(np.int64)), list(precisions), rounds=rounds, **options
    )
