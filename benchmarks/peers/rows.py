"""Rows of uneven difficulty to their fixed points, by one contender in a process of its own, one request a line.

python -m benchmarks.peers.rows eqr --serve <<< '{"tol": 1e-4}'

The fixed points are known: each row contracts to its target at a rate of its own, by an orthogonal map of all features.
A contender stops at a relative residual ||z_k - z_{k-1}|| / ||z_k|| of `tol`: a row by itself ("eqr"), the whole batch
when its slowest row has (the loops), or torchdeq by its own rule, of a tensor of all rows.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import fixed_point

from .answering import own_output, serve

ROWS, FEATURES, DEPTH = 512, 512, 4000


class Problem:
    """ROWS contractions with rates from 0.1 to 0.99, and the rows that each call of the step computes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rate = torch.linspace(0.1, 0.99, ROWS)[:, None]
        self.target = torch.randn(ROWS, FEATURES, generator=generator)
        self.map = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator))[0]
        self.z0 = torch.zeros(ROWS, FEATURES)
        self.computed = 0

    def step(self, z: Tensor, rate: Tensor, target: Tensor) -> Tensor:
        """z, target [n, FEATURES], rate [n, 1] -> the next z."""
        self.computed += len(z)
        return target + rate * ((z - target) @ self.map)

    def all_rows(self, z: Tensor) -> Tensor:
        return self.step(z, self.rate, self.target)


def eqr(p: Problem, tol: float, solver: str = "picard") -> Tensor:
    z: Tensor = fixed_point(p.step, p.z0, p.rate, p.target, depth=DEPTH, tol=tol, solver=solver).z
    return z


def loop(p: Problem, tol: float, step: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    z, advance = p.z0, step or p.all_rows
    for _ in range(DEPTH):
        new = advance(z)
        settled = ((new - z).norm(dim=1) <= tol * new.norm(dim=1)).all()
        z = new
        if settled:
            break
    return z


def compiled(p: Problem, tol: float) -> Tensor:
    return loop(p, tol, _compiled(p))


def _compiled(p: Problem) -> Callable[[Tensor], Tensor]:
    if not hasattr(p, "compiled"):

        @torch.compile(dynamic=False)
        def advance(z: Tensor) -> Tensor:
            return p.target + p.rate * ((z - p.target) @ p.map)

        p.compiled = advance  # type: ignore[attr-defined]

    def counted(z: Tensor) -> Tensor:
        p.computed += len(z)
        return p.compiled(z)  # type: ignore[attr-defined, no-any-return]

    return counted


def torchdeq(p: Problem, tol: float, solver: str) -> Tensor:
    from torchdeq import get_deq

    deq = get_deq(f_solver=solver, f_max_iter=DEPTH, f_tol=tol, f_stop_mode="rel")
    out, _ = deq(p.all_rows, p.z0)
    z: Tensor = out[-1]
    return z


CONTENDERS: dict[str, Callable[[Problem, float], Tensor]] = {
    "eqr": eqr,
    "eqr anderson": lambda p, tol: eqr(p, tol, "anderson"),
    "loop": loop,
    "loop compiled": compiled,
    "torchdeq": lambda p, tol: torchdeq(p, tol, "fixed_point_iter"),
    "torchdeq anderson": lambda p, tol: torchdeq(p, tol, "anderson"),
}


def answer(run: Callable[[Problem, float], Tensor], p: Problem, tol: float) -> dict[str, Any]:
    p.computed = 0
    start = time.perf_counter()
    z = run(p, tol)
    seconds = time.perf_counter() - start
    new = p.target + p.rate * ((z - p.target) @ p.map)
    return {
        "seconds": seconds,
        "computed": p.computed,
        # Of every row one step further, so that all are judged alike, and how far it is from where it belongs.
        "residual": ((new - z).norm(dim=1) / new.norm(dim=1)).tolist(),
        "error": float((z - p.target).norm() / p.target.norm()),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.peers.rows", description="Solve what is asked for on stdin.")
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    answers = own_output()
    problem, run = Problem(), CONTENDERS[options.contender]
    try:
        run(problem, 0.5)  # imports and compiles
        info: dict[str, Any] = {}
    except ImportError as error:
        info = {"skipped": f"{error}; pip install torchdeq"}
    serve(answers, info, lambda request: answer(run, problem, **request))


if __name__ == "__main__":
    main()
