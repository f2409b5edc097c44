"""One solve of one backend for a profiler to look at: one kernel launch for the fused backends.

python benchmarks/profile/launch.py --backend triton --preset sudoku-paper --trajectories 528 --depth 4

The weights and tokens are random, halting is off, and a solve of the same sizes goes before, so that compiling, tuning
and first touches stay out: only the last solve lies between cudaProfilerStart and cudaProfilerStop. With --backend cpu
or reference it runs without a GPU as well. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

REGIMES = ("auto", "latency", "throughput")
REGIME_VARIABLE = "EQR_CUDA_REGIME"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one launch of one backend under a profiler.")
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu", "reference"), default="cuda")
    parser.add_argument("--preset", choices=("sudoku-paper", "sudoku-small", "maze"), default="sudoku-paper")
    parser.add_argument("--trajectories", type=int, default=528)
    parser.add_argument("--depth", type=int, default=4, help="outer steps of each trajectory")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="bf16")
    parser.add_argument("--regime", choices=REGIMES, default="auto", help="kernel of the cuda backend")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, but for the cpu backend")
    parser.add_argument("--no-warm-up", action="store_true", help="the profiled solve is the first (for sanitizers)")
    options = parser.parse_args()
    if options.regime != "auto" and options.backend != "cuda":
        parser.error(f"--regime {options.regime} is for --backend cuda, got --backend {options.backend}; leave it out")
    for name in ("trajectories", "depth"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.device is None:
        here = options.backend == "reference" and not torch.cuda.is_available()
        options.device = "cpu" if options.backend == "cpu" or here else "cuda"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--backend {options.backend} needs a CUDA device and torch sees none; use --backend cpu or reference"
        )
    return options


def main() -> None:
    options = arguments()
    if options.regime != "auto":
        os.environ[REGIME_VARIABLE] = options.regime
    from benchmarks.peers.workload import Workload, operations

    work = Workload(options.preset, options.trajectories, device=options.device)
    solving = dict(depth=options.depth, halt="none", slots=options.trajectories, ids=torch.arange(options.trajectories))
    solving |= dict(backend=options.backend, precision=options.precision)
    if not options.no_warm_up:
        work.model.solve(work.tokens, **solving)
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    result = work.model.solve(work.tokens, **solving)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    assert result.backend == options.backend and result.logits.isfinite().all()
    total = operations(work.model.config).total * int(result.nfe.sum())
    print(f"ran: {result.backend_reason}")
    print(f"outer steps: {int(result.nfe.sum())}")
    print(f"operations in its matrix products: {total}")


if __name__ == "__main__":
    main()
