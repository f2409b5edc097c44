"""`solve` of the shipped model in a process of its own, one request a line.

python -m benchmarks.peers.solver sudoku-small --serve <<< '{"tokens": [[...]], "options": {"depth": 64}}'

The options are those of `solve`. An answer holds the seconds, what came out, and the memory at its highest so far.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import torch

from eqr_kernels import EquilibriumReasoner, backends, ops, tolerance
from eqr_kernels.backends.cpu import CpuBackend
from eqr_kernels.precision import NAMED, Precision

from .answering import own_output


def peak_rss() -> int:
    """Bytes of this process at the highest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def card_tolerance(model: EquilibriumReasoner) -> float:
    """What solve halts at."""
    known = tolerance.card_tolerance(model.card)
    assert known is not None
    return known.value


def solve(model: EquilibriumReasoner, request: dict[str, Any]) -> dict[str, Any]:
    tokens = torch.tensor(request["tokens"])
    start = time.perf_counter()
    result = model.solve(tokens, **request["options"])
    seconds = time.perf_counter() - start
    answer: dict[str, Any] = {
        "seconds": seconds,
        "preds": result.preds.tolist(),
        "converged": result.converged.tolist(),
        "residual": result.residual.tolist(),
        "nfe": int(result.nfe.sum()),
        "backend": result.backend,
        "backend_reason": result.backend_reason,
        "peak_rss": peak_rss(),
    }
    if result.residuals is not None:
        # Whether the tolerance was met on the way, where nothing stops at it.
        answer["met"] = (result.residuals <= card_tolerance(model)).any(-1).any(-1).tolist()
    return answer


def info(model: EquilibriumReasoner) -> dict[str, Any]:
    """What the cpu backend can run here, and the memory that a trajectory in flight takes in each precision."""
    reasons = {precision.name: backends.available(model, precision)["cpu"] for precision in NAMED}
    can_run = [name for name, why_not in reasons.items() if why_not is None]
    facts: dict[str, Any] = {"cpu": reasons, "rss_of_start": peak_rss(), "tol": card_tolerance(model)}
    if can_run:
        packs = {name: CpuBackend().packed(model, Precision[name]) for name in can_run}
        facts["trajectory_bytes"] = {name: ops.trajectory_bytes(packed) for name, packed in packs.items()}
        facts["packed_bytes"] = {name: packed.data.nbytes for name, packed in packs.items()}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.peers.solver", description="Solve what is asked for on stdin.")
    parser.add_argument("model", help="a shipped model, or a path")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--info", action="store_true", help="only say what this model can run with, and end")
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    answers = own_output()
    torch.set_num_threads(options.threads)
    model = EquilibriumReasoner.from_pretrained(options.model)
    print(json.dumps(info(model) if options.info else {}), file=answers, flush=True)
    if not options.info:
        for line in sys.stdin:
            print(json.dumps(solve(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
