"""One contender in a process of its own: checks its output against the reference, then times its outer steps.

python -m benchmarks.peers.run eager-cast --preset sudoku-paper --batch 8 --dtype fp32 --threads 2 --json

With --serve it answers requests, one JSON line each, so that several processes can take turns (see process.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any, TextIO

import torch

from . import GPU_PEERS, OURS, PEERS
from .answering import own_output
from .contenders import Solving, Stepping, check
from .meter import Meter
from .workload import PRESETS, Unavailable, Workload, has_bf16

Contender = Stepping | Solving | Meter


def arguments() -> argparse.Namespace:
    listing = "\n".join(f"  {name:18s}{text}" for name, text in {**OURS, **PEERS, **GPU_PEERS}.items())
    parser = argparse.ArgumentParser(
        "benchmarks.peers.run",
        description=f"Time one contender's outer steps.\n{listing}\n  meter             the registers' peak alone",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*OURS, *PEERS, *GPU_PEERS, "meter"])
    parser.add_argument("--preset", choices=PRESETS, default="sudoku-paper")
    parser.add_argument("--pretrained", action="store_true", help="the weights of the shipped model of that name")
    parser.add_argument("--batch", type=int, default=1)
    default = "bf16" if has_bf16() else "fp32"
    parser.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default=default, help=f"here: {default}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7, help="timings to take, of one or more outer steps each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Contender, dict[str, Any]]:
    """The contender, checked and warm, and what is known of it."""
    if options.name == "meter":
        meter = Meter(options.threads)
        return meter, {}
    if options.dtype == "int8" and options.name != "cpu":
        raise Unavailable(f"{options.name} has no int8")
    work = Workload(options.preset, options.batch, options.pretrained, options.device)
    kind = Solving if options.name in OURS else Stepping
    start = time.perf_counter()
    contender = kind(options.name, work, options.dtype)
    errors = check(contender, options.dtype)
    contender.warm_up()
    return contender, {**errors, "prepared_s": time.perf_counter() - start, **contender.info}


def serve(contender: Contender, answers: TextIO) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if "query" in request:
            assert not isinstance(contender, Meter)
            preds = contender.query(request["query"])
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "preds": preds.tolist()}
        else:
            answer = contender.turn()
        print(json.dumps(answer), file=answers, flush=True)


def summary(options: argparse.Namespace, contender: Contender) -> dict[str, Any]:
    turns = [contender.turn() for _ in range(max(2, options.turns))]
    if "peak" in turns[0]:
        peaks = {p: statistics.median(t["peak"][p] for t in turns) for p in turns[0]["peak"]}
        return {f"{precision}_gop_per_s": round(rate / 1e9, 1) for precision, rate in peaks.items()}
    measured: dict[str, Any] = {}
    for key, name in (("seconds", "ms_per_trajectory_step"), ("solve_seconds", "ms_per_trajectory_step_of_solve")):
        if key in turns[0]:
            times = [turn[key] / options.batch * 1e3 for turn in turns]
            fifths = statistics.quantiles(times, n=5)
            measured |= {name: statistics.median(times), f"{name}_p20": fifths[0], f"{name}_p80": fifths[-1]}
    return measured


def main() -> None:
    options = arguments()
    answers = own_output()
    torch.set_num_threads(options.threads)
    info = dict(contender=options.name, preset=options.preset, batch=options.batch, dtype=options.dtype)
    info["threads"] = options.threads
    inference = torch.inference_mode if not options.name.startswith("compile") else torch.no_grad
    with inference():
        try:
            contender, measured = prepare(options)
        except Unavailable as reason:
            print(json.dumps({**info, "skipped": str(reason)}), file=answers, flush=True)
            return
        if options.serve:
            print(json.dumps({**info, **measured}), file=answers, flush=True)
            serve(contender, answers)
            return
        info |= measured | summary(options, contender)
    if options.json:
        print(json.dumps(info), file=answers)
    else:
        for key, value in info.items():
            print(f"{key:36s} {value:.4g}" if isinstance(value, float) else f"{key:36s} {value}", file=answers)


if __name__ == "__main__":
    main()
