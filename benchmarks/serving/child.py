"""One server in a process of its own, told what to measure: see peers/process.py."""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch

from benchmarks.serving import load, servers
from benchmarks.serving.workload import Workload


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    warnings.simplefilter("ignore")  # of tol="auto", at every request
    workload = Workload(**given | {"clues": tuple(given["clues"])})
    model, tokens = workload.load(), workload.draw()
    halt = "none" if name == servers.FULL_DEPTH else "residual"
    solved = model.solve(tokens, depth=workload.depth, tol=workload.tol, halt=halt)
    print(json.dumps({"backend": solved.backend_reason, "steps": solved.nfe.tolist()}), flush=True)
    for line in sys.stdin:
        what: dict[str, Any] = json.loads(line)
        server = servers.make(name, model, workload)
        try:
            for _ in range(3):
                server.submit(tokens[0]).result()
            print(json.dumps(measure(server, workload, tokens, solved.preds, **what)), flush=True)
        finally:
            server.close()


def measure(server: servers.Server, workload: Workload, tokens: Any, answers: Any, **what: Any) -> dict[str, Any]:
    kind = what.pop("measure")
    if kind == "saturation":
        return load.saturation(server, workload, tokens, answers, **what)
    if kind == "offered":
        return load.offered(server, workload, tokens, answers, **what)
    return beside(server, tokens, **what)


def beside(server: servers.Server, tokens: torch.Tensor, hard: int) -> dict[str, Any]:
    """Seconds that an easy request takes alone, and beside `hard` hard ones which were there before it; medians."""

    def timed() -> float:
        begun = time.perf_counter()
        server.submit(tokens[0]).result()
        return time.perf_counter() - begun

    alone = sorted(timed() for _ in range(15))[7]
    half = len(tokens) // 2
    others = [server.submit(tokens[half + i % half]) for i in range(hard)]
    time.sleep(5 * alone)
    company = sorted(timed() for _ in range(15))
    running = sum(not other.done() for other in others)
    return {"alone": alone, "beside": company[7], "beside_worst": company[-1], "hard": hard, "hard_running": running}


if __name__ == "__main__":
    main()
