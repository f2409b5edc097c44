"""A made-up curve report: puzzles whose trajectories settle at random steps, counted as `eqr curve` counts."""

from __future__ import annotations

import dataclasses

import numpy as np

from eqr_kernels.studies.checking import Checked
from eqr_kernels.studies.costs import Energy, Latency, Memory, Price, UnitCosts
from eqr_kernels.studies.curve_report import (
    CheckedPoint,
    CurveReport,
    EarlyExit,
    GroupSteps,
    Puzzles,
    Recommendation,
    Residuals,
    Settings,
    Settling,
)
from eqr_kernels.studies.points import Point, Saving, bend
from eqr_kernels.studies.replay import Policy, policies
from eqr_kernels.studies.scoring import Accuracy

DEPTHS, BREADTHS, TOLS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32), (0.02, 0.028, 0.05, 0.1)
N = 200
GROUPS = {"17_clue": 24, "forum_hardest_1905_11plus": 160, "magictour_top1465": 16}


def make_report(gpu: bool = False, price: bool = True, seed: int = 0) -> CurveReport:
    """A report of 200 puzzles at depth 64 and breadth 32, on a CPU or a GPU."""
    rng = np.random.default_rng(seed)
    hardness = np.repeat([1.2, 3.3, 2.0], list(GROUPS.values()))
    settles = np.exp(hardness[:, None] + rng.normal(0, 0.9, (N, 1)) + rng.normal(0, 0.5, (N, 32))).round() + 2  # [N, B]
    right = rng.random((N, 32)) < 0.97
    points: list[Point] = []
    costs = UnitCosts(
        latency=tuple(Latency(b, 0.9 + 0.01 * b, 0.30 + 0.65 / b**0.7) for b in BREADTHS),
        trajectories=64,
        ms_per_nfe=0.41,
        units=1 if gpu else 2,
        unit="GPU" if gpu else "core",
        memory=tuple(Memory(d, b, 3_100_000 + 165_000 * b + 900 * (d % 7)) for d in (1, 4, 16, 64) for b in (1, 8, 32)),
        energy=Energy(0.011, 412.0, "NVML") if gpu else None,
        side_by_side=gpu,
    )

    def add(policy: Policy) -> None:
        at = settles[:, : policy.breadth] * (1.0 if policy.tol is None else (0.028 / policy.tol) ** 0.2)
        done = at <= policy.depth
        first = np.where(done, at, np.inf).argmin(1)
        correct = done.any(1) & right[np.arange(N), first]
        steps = np.minimum(at, policy.depth) if policy.name != "fixed" else np.full_like(at, policy.depth)
        if policy.select == "first":
            steps = np.minimum(steps, steps.min(1, keepdims=True))
        nfe, alone = steps.sum(1), costs.latency_of(policy.breadth)
        p50, p95, p99 = np.percentile(alone.overhead_ms + alone.ms_per_nfe * nfe, (50, 95, 99)).tolist()
        mean = float(nfe.mean())
        seconds = mean * costs.ms_per_nfe / 1e3
        points.append(
            Point(
                policy,
                Accuracy(int(correct.sum()), N),
                None if policy.name == "fixed" else float(done.any(1).mean()),
                mean,
                (p50, p95, p99),
                1 / seconds,
                seconds * costs.units,
                1000 * seconds * 0.1 / 3600 if price else None,
                mean * 0.011 if gpu else None,
            )
        )

    for policy in policies(DEPTHS, BREADTHS, TOLS):
        add(policy)
    where = bend(points)
    front = where.front
    where = dataclasses.replace(where, knee=front[len(front) // 3])
    steps = np.where(settles[:, :8].min(1) <= 64, settles[:, :8].min(1), 0).astype(int)
    ends = np.cumsum([0, *GROUPS.values()])
    last = np.where(settles <= 64, rng.normal(-1.78, 0.05, settles.shape), rng.normal(-0.6, 0.35, settles.shape))
    correct = right & (settles <= 64)
    edges = np.linspace(-2.2, 0.4, 53)

    def histogram(rows: slice, kind: bool) -> tuple[int, ...]:
        return tuple(np.bincount(steps[rows][correct[rows, 0] == kind], minlength=65)[1:].tolist())

    def checked(index: int) -> CheckedPoint:
        p = points[index]
        a, b, c = p.latency_ms
        latency, count = (1.04 * a, 1.04 * b, 1.04 * c), p.accuracy.correct
        run = Checked(N, count, count, 1.01 * p.nfe, p.nfe, 0.97 * p.throughput, N, latency, p.latency_ms)
        return CheckedPoint(index, ("bend",), run)

    chosen = points[front[len(front) // 2]]
    return CurveReport(
        model="sudoku-small",
        task="sudoku",
        puzzles=Puzzles(N, N, "dev.csv.gz", dict(GROUPS), None, None),
        settings=Settings(
            depth=64,
            breadth=32,
            views=False,
            turns=None,
            depths=DEPTHS,
            breadths=BREADTHS,
            tols=TOLS,
            recorded_depths=None,
            card_tol=0.028,
            select="residual",
            seed=0,
            slots=None,
            noise_scale=0.01,
            window=3,
            precision="bfloat16",
            instruction_set=None if gpu else "avx512_bf16",
            config={"hidden_size": 128},
            price=Price(0.10, "USD") if price else None,
        ),
        device="NVIDIA H100 80GB HBM3" if gpu else "AMD EPYC avx512 bf16, 2 threads",
        backend="cuda" if gpu else "cpu",
        backend_reason="the first of those that can run this model here",
        layers_per_step=8,
        unit_costs=costs,
        points=tuple(points),
        bend=where,
        checked=tuple(map(checked, dict.fromkeys((where.cheapest_within, where.best, front[len(front) // 2])))),
        early_exit=EarlyExit(
            0.028,
            tuple(Saving(b, Accuracy(169, N), Accuracy(168, N), 2, 1, 64.0 * b, 18.9 * b, 0.86) for b in BREADTHS),
        ),
        settling=Settling(
            0.028,
            tuple(
                GroupSteps(name, size, histogram(slice(a, b), True), histogram(slice(a, b), False))
                for (name, size), a, b in zip(GROUPS.items(), ends, ends[1:], strict=False)
            ),
        ),
        residuals=Residuals(
            trajectories=N * 32,
            right=int(correct.sum()),
            diverged=0,
            auroc=0.991,
            log10_edges=tuple(edges.tolist()),
            right_counts=tuple(np.histogram(last[correct], edges)[0].tolist()),
            wrong_counts=tuple(np.histogram(last[~correct], edges)[0].tolist()),
        ),
        recommendation=Recommendation(
            0.95, None, points.index(chosen), chosen.policy.call(), "the cheapest point that reaches the target"
        ),
        reproduce={
            "command": "eqr curve dev.csv.gz --depth 64 --breadth 32 --price 0.10 --target 0.95",
            "weights_sha256": "9f" * 32,
            "data_sha256": "31" * 32,
            "device_name": "AMD EPYC",
            "torch_threads": 2,
            "versions": {"eqr_kernels": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        },
        errors=(),
        seconds=812.4,
    )
