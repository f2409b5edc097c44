"""What `eqr curve` measures beside the recording, and how it is put into JSON, pictures and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eqr_kernels.cli.console import to_json, write_atomically

if TYPE_CHECKING:
    from eqr_kernels.reasoner import EquilibriumReasoner
    from eqr_kernels.studies.checking import Checked
    from eqr_kernels.studies.costs import UnitCosts
    from eqr_kernels.studies.points import Bend, Point
    from eqr_kernels.studies.recording import Recording
    from eqr_kernels.tasks.common import PuzzleSet

_BINS = 40
_MOST_CHECKED = 6
_DEFAULT_RULE = ("select", "residual")


def measure(
    model: EquilibriumReasoner,
    puzzles: PuzzleSet,
    breadths: Sequence[int],
    depth: int,
    *,
    quick: bool,
    progress: Callable[[int, int], object],
    options: dict[str, Any],
) -> UnitCosts:
    """Times and memory of outer steps, on these puzzles."""
    import torch

    from eqr_kernels import studies

    return studies.measure_costs(
        model,
        torch.from_numpy(puzzles.inputs.astype(np.int64)),
        breadths,
        depths=sorted({min(16, depth), depth, 16 * depth}),
        seconds=0.1 if quick else 0.3,
        rounds=3 if quick else 7,
        progress=progress,
        **options,
    )


def check(
    model: EquilibriumReasoner,
    puzzles: PuzzleSet,
    recording: Recording,
    found: list[Point],
    costs: UnitCosts,
    chosen: int | None,
    *,
    quick: bool,
    progress: Callable[[int, int], object],
    options: dict[str, Any],
) -> list[tuple[int, list[str], Checked]]:
    """The points that are named, and some of the front between them, run for real: index, why, what came out."""
    from eqr_kernels import studies
    from eqr_kernels.studies import checking

    assert puzzles.labels is not None
    bend = studies.bend(found)
    named = [("best", bend.best), ("cheapest within 0.5 points", bend.cheapest_within), ("knee", bend.knee)]
    named.append(("recommended", chosen))
    why: dict[int, list[str]] = {}
    for name, index in named:
        if index is not None:
            why.setdefault(index, []).append(name)
    spread = np.linspace(0, len(bend.front) - 1, _MOST_CHECKED).round().astype(int)
    for place in spread if not quick else ():
        if len(why) < _MOST_CHECKED:
            why.setdefault(bend.front[place], ["front"])
    told = []
    for done, (index, reasons) in enumerate(sorted(why.items())):
        point = found[index]
        replayed = studies.outcome(recording, point.policy)
        computed = costs.query_ms(point.policy.breadth, replayed.nfe, replayed.longest)
        checked = checking.check(
            model,
            puzzles.inputs,
            puzzles.labels,
            point,
            replayed,
            computed,
            seconds=2.0 if quick else 10.0,
            **options,
        )
        progress(done + 1, len(why))
        told.append((index, reasons, checked))
    return told


def resolved(model: EquilibriumReasoner, options: dict[str, Any]) -> dict[str, Any]:
    """What decides the answers of a run beside weights, puzzles, sizes and seed: in words and numbers, not defaults."""
    import torch

    import eqr_kernels
    from eqr_kernels import backends, ops
    from eqr_kernels.solver import precision_of

    precision = precision_of(model, options["precision"])
    backend = backends.choose(options["backend"], model, precision)[0].name
    noise_scale, window = options["noise_scale"], options["window"]
    return {
        "config": model.config.to_dict(),
        "noise_scale": model.inference_noise_scale if noise_scale is None else noise_scale,
        "window": model.inference_window if window is None else window,
        "backend": backend,
        "precision": str(precision.dtype).removeprefix("torch."),
        "instruction_set": ops.cpu_isa() if backend == "cpu" else None,
        "device": str(model.device),
        "torch": torch.__version__,
        "eqr_kernels": eqr_kernels.__version__,
    }


def groups(puzzles: PuzzleSet) -> dict[str, int]:
    """How many puzzles come from each source, in order of appearance."""
    names = puzzles.source.tolist()
    return {name: names.count(name) for name in dict.fromkeys(names)}


def tell(
    model: EquilibriumReasoner,
    puzzles: PuzzleSet,
    recording: Recording,
    found: list[Point],
    costs: UnitCosts,
    checked: list[tuple[int, list[str], Checked]],
    tol: float | None,
) -> dict[str, Any]:
    """The measured part of the report."""
    from eqr_kernels import studies
    from eqr_kernels.cli.provenance import device_name

    bend = studies.bend(found)
    breadths = sorted({p.policy.breadth for p in found})
    layers = model.config.H_cycles * (model.config.L_cycles + 1) * model.config.L_layers
    return {
        "device": f"{device_name(model.device)}, {costs.units} {costs.unit}{'s' if costs.units > 1 else ''}",
        "backend": recording.backend,
        "backend_reason": recording.backend_reason,
        "layers_per_step": layers,
        "unit_costs": _unit_costs(costs),
        "points": [_point(p, layers, costs) for p in found],
        "front": bend.front,
        "bend": _bend(bend),
        "checked": [_checked(*row, found) for row in checked],
        "savings": None if tol is None else _savings(recording, breadths, tol, found[0].policy.select),
        "convergence": None if tol is None else _convergence(puzzles, recording, tol),
        "coupling": _coupling(recording),
    }


def _percentiles(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("p50", "p95", "p99"), values, strict=True))


def _unit_costs(costs: UnitCosts) -> dict[str, Any]:
    energy = costs.energy
    return {
        "latency": [vars(x) for x in costs.latency],
        "saturation": {"trajectories": costs.trajectories, "ms_per_nfe": costs.ms_per_nfe},
        "unit": costs.unit,
        "units": costs.units,
        "memory": [vars(x) for x in costs.memory],
        "energy": None if energy is None else vars(energy),
    }


def _point(p: Point, layers: int, costs: UnitCosts) -> dict[str, Any]:
    policy = p.policy
    return {
        "policy": policy.name,
        "depth": policy.depth,
        "breadth": policy.breadth,
        "tol": policy.tol,
        "select": policy.select,
        "accuracy": p.accuracy.as_json(),
        "nfe": p.nfe,
        "layer_equivalents": p.nfe * layers,
        "settled": p.settled,
        "latency_ms": _percentiles(p.latency_ms),
        "throughput": p.throughput,
        f"{costs.unit.lower()}_seconds": p.unit_seconds,
        "cost_per_1000": p.cost_per_1000,
        "joules": p.joules,
    }


def _bend(bend: Bend) -> dict[str, Any]:
    from eqr_kernels.studies.points import WITHIN_POINTS

    within = {"points": WITHIN_POINTS, "index": bend.cheapest_within}
    return {"best": bend.best, "cheapest_within": within, "knee": bend.knee}


def _checked(index: int, why: list[str], found: Checked, points: list[Point]) -> dict[str, Any]:
    point = points[index]
    return {
        "index": index,
        "why": why,
        "puzzles": found.puzzles,
        "correct": found.correct,
        "correct_computed": found.computed_correct,
        "nfe": found.nfe,
        "nfe_computed": found.computed_nfe,
        "queries": found.queries,
        "latency_ms": _percentiles(found.latency_ms),
        "latency_ms_computed": _percentiles(found.computed_ms),
        "latency_error": found.latency_error,
        "throughput": found.throughput,
        "throughput_error": point.throughput / found.throughput - 1,
    }


def _savings(recording: Recording, breadths: Sequence[int], tol: float, select: str) -> dict[str, Any]:
    """At the greatest breadth, and a row for each."""
    from eqr_kernels.studies import points

    rows = [
        {
            "breadth": s.breadth,
            "depth": recording.depth,
            "accuracy_full": s.full.share,
            "accuracy_exit": s.exit.share,
            "lost": s.lost,
            "gained": s.gained,
            "nfe_full": s.nfe_full,
            "nfe_exit": s.nfe_exit,
            "times": s.times,
            "settled": s.settled,
        }
        for s in points.savings(recording, breadths, tol=tol, select=select)
    ]
    return {"tol": tol, **rows[-1], "rows": rows}


def _convergence(puzzles: PuzzleSet, recording: Recording, tol: float) -> dict[str, Any]:
    from eqr_kernels.studies import points

    steps, settled = points.steps_to_settle(recording, tol)
    told = []
    for name, count in groups(puzzles).items():
        rows = (puzzles.source == name) & settled
        histogram = np.bincount(steps[rows], minlength=recording.depth + 1)[1:]
        told.append({"name": name, "puzzles": count, "settled": int(rows.sum()), "steps": histogram.tolist()})
    return {"tol": tol, "depth": recording.depth, "groups": told}


def _coupling(recording: Recording) -> dict[str, Any]:
    """Of all trajectories at the greatest depth; those that diverged rank last and are in no bin."""
    from eqr_kernels.studies.statistics import auroc

    residual, right = recording.residual[:, :, -1].ravel(), recording.correct[:, :, -1].ravel()
    sound = np.isfinite(residual) & ~recording.diverged[:, :, -1].ravel()
    cost = np.where(sound, residual, np.inf)
    shown = np.log10(np.maximum(residual[sound], 1e-12))
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (-1.0, 0.0)
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    return {
        "depth": recording.depth,
        "trajectories": len(right),
        "right": int((right & sound).sum()),
        "diverged": int((~sound).sum()),
        "auroc": None if math.isnan(value := auroc(cost, right)) else value,
        "log10_edges": edges.tolist(),
        "right_counts": np.histogram(shown[right[sound]], edges)[0].tolist(),
        "wrong_counts": np.histogram(shown[~right[sound]], edges)[0].tolist(),
    }


def recommendation(
    found: list[Point], chosen: int | None, target: float | None, budget: str | None, options: dict[str, Any]
) -> dict[str, Any] | None:
    """What to call `solve` with, and why."""
    if target is None and budget is None:
        return None
    wanted = " and ".join([*([f"accuracy {target:g}"] if target else []), *([f"at most {budget}"] if budget else [])])
    told: dict[str, Any] = {"target": target, "budget": budget, "index": chosen, "arguments": None}
    if chosen is None:
        best = max(p.accuracy.share for p in found)
        if target and best < target:
            why = f"the most accurate reaches {best:.3f}; `eqr diagnose` says whether more depth or breadth can help"
        else:
            why = "what is as cheap is not as accurate; raise --budget" if target else "all cost more; raise --budget"
        told["reason"] = f"no point of the map offers {wanted}: {why}"
        return told
    point = found[chosen]
    low, high = point.accuracy.interval
    arguments = {name: value for name, value in point.policy.arguments().items() if (name, value) != _DEFAULT_RULE}
    # A noise scale of 0 was asked for; a seed of 0 is what solve takes anyway.
    arguments |= {n: v for n, v in options.items() if v not in (None, "auto") and (n, v) != ("seed", 0)}
    told["arguments"] = ", ".join(f"{name}={json.dumps(value)}" for name, value in arguments.items())
    told["reason"] = (
        f"{'the cheapest' if target else 'the most accurate'} point that offers {wanted}: "
        f"{point.accuracy.share:.3f} ({low:.3f} to {high:.3f}) on the same puzzles that it was chosen on"
    )
    if target and low < target:
        told["reason"] += f"; with so few puzzles it is not sure to reach {target:g} on others"
    return told


def write(report: dict[str, Any], out: Path) -> list[Path]:
    """curve.json, then the pictures and the page: what was written."""
    from eqr_kernels.cli.render import write_report

    path = out / "curve.json"
    text = to_json(report)
    write_atomically(path, text.encode())
    return [path, *write_report(report, out)]
