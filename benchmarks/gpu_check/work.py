"""What a stage measures, in a process of its own: `python -m benchmarks.gpu_check.work NAME JSON`, a JSON line a row.

A row with the key "wrong" holds a result that must not be, one with "skipped" or "failure" what was not measured.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import eqr_kernels
from eqr_kernels import EquilibriumReasoner, backends, ops
from eqr_kernels.cli.info import cuda_report, gpu_report
from eqr_kernels.commit import code_commit
from eqr_kernels.precision import Precision
from eqr_kernels.tolerance import card_tolerance

from ..peers import OURS, contenders
from ..peers.answering import own_output
from ..peers.contenders import Solving, Stepping, check, elapsed
from ..peers.workload import PRESETS, Unavailable, Workload, operations

Rows = Iterator[dict[str, Any]]
NEEDED = (
    "setuptools",
    "pybind11",
    "cmake",
    "ninja",
    "typer",
    "rich",
    "scipy",
    "safetensors",
    "pytest",
    "pytest_benchmark",
    "hypothesis",
)
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nsys", "c++")


def environment() -> Rows:
    """What is here. `device` is None where torch sees no GPU."""
    on_gpu = torch.cuda.is_available()
    cuda_bin = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    yield {
        "device": torch.cuda.get_device_name() if on_gpu else None,
        "gpus": [gpu_report(i) for i in range(torch.cuda.device_count())],
        "cuda": cuda_report(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _version("triton"),
        "eqr_kernels": eqr_kernels.__version__,
        "commit": code_commit() or os.environ.get("EQR_COMMIT", ""),
        "tools": {name: shutil.which(name, path=cuda_bin) for name in TOOLS},
        "missing_packages": [name for name in NEEDED if importlib.util.find_spec(name) is None],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable(device: str) -> Rows:
    """The extension, and which backends can run on the device in bf16, or why not."""
    built, status = ops.extension_status()
    model = EquilibriumReasoner(PRESETS["sudoku-small"]()).to(device)
    reasons = backends.available(model, Precision.bf16)
    yield {"loaded": built, "extension": status, "build": ops.build_info() if built else None, "backends": reasons}


def gemm(device: str, size: int, repeats: int) -> Rows:
    """The rate of a bf16 matrix product [size, size] x [size, size] of random numbers, by the library torch uses."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(5):
        torch.mm(a, b, out=out)
    seconds = [elapsed(device, lambda: torch.mm(a, b, out=out)) for _ in range(repeats)]
    rates = [2 * size**3 / s for s in seconds]
    yield {"size": size, "repeats": repeats, "per_second": statistics.median(rates), **_range(rates)}


def _range(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "most": max(values)}


def outer_step(name: str, preset: str, device: str, sizes: list[int], turns: int, seconds: float) -> Rows:
    """Milliseconds of an outer step of `size` trajectories together, for each size, checked before it is timed.

    Args:
        turns: timings to take, of about `seconds` each.
    """
    precision, contenders.SECONDS = "bf16", seconds
    kind = Solving if name in OURS else Stepping
    with torch.no_grad() if name.startswith("compile") else torch.inference_mode():
        for size in sizes:
            row: dict[str, Any] = {"contender": name, "trajectories": size, "preset": preset, "precision": precision}
            start, work, contender = time.perf_counter(), None, None
            try:
                work = Workload(preset, size, device=device)
                contender = kind(name, work, precision)
                row |= check(contender, precision)
                contender.warm_up()
                row["prepared_s"] = round(time.perf_counter() - start, 2)
                ms = [contender.turn()["seconds"] * 1e3 for _ in range(turns)]
                row |= {"ms": statistics.median(ms), **_range(ms), "steps_a_turn": contender.count, **contender.info}
                row["operations"] = operations(work.model.config).total * size
            except Unavailable as reason:
                yield row | {"skipped": str(reason)}
                return
            except AssertionError as error:
                row |= {"wrong": _headline(error)}
            except RuntimeError as error:
                row |= {"failure": _headline(error)}
            yield row
            del contender, work  # before the next size takes its memory
            if name.startswith("compile"):
                torch.compiler.reset()  # what was compiled for one size counts against a limit of recompilations
            if device == "cuda":
                torch.cuda.empty_cache()


def _headline(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _draw(path: str, count: int) -> Tensor:
    """Real puzzles with clues revealed to 30-50, drawn with a fixed seed: tokens [count, 81]."""
    from eqr_kernels.tasks import sudoku

    file = Path(path) / "dev.csv.gz" if Path(path).is_dir() else Path(path)
    puzzles = sudoku.load_csv(file)
    rng = numpy.random.default_rng(2605)
    rows = rng.permutation(len(puzzles.inputs))[:count]
    inputs = puzzles.inputs[rows]
    if puzzles.labels is not None:
        inputs = sudoku.reveal(inputs, puzzles.labels[rows], rng.integers(30, 51, len(rows)), rng)
    return torch.from_numpy(inputs).long()


def early_exit(names: list[str], device: str, puzzles: str, count: int, depth: int, repeats: int) -> Rows:
    """Seconds of a solve that stops when settled against one to the full depth, on the shipped model.

    Answers must agree where both have settled, within a backend and with those of the first backend named.
    """
    model = EquilibriumReasoner.from_pretrained("sudoku-small").to(device)
    tokens = _draw(puzzles, count).to(device)
    known = card_tolerance(model.card)
    assert known is not None
    first: tuple[str, Tensor, Tensor] | None = None
    for name in names:
        options: dict[str, Any] = dict(depth=depth, backend=name, precision="bf16", slots=len(tokens))

        def solve(halt: str, options: dict[str, Any] = options) -> Any:
            return model.solve(tokens, halt=halt, **options)

        try:
            early, full = solve("residual"), solve("none")
            seconds = {h: [elapsed(device, lambda h=h: solve(h)) for _ in range(repeats)] for h in ("residual", "none")}
        except RuntimeError as error:
            yield {"backend": name, "failure": _headline(error)}
            continue
        settled = early.converged & (full.residual <= known.value)
        agree = (early.preds == full.preds).all(1)[settled]
        median = {halt: statistics.median(times) for halt, times in seconds.items()}
        row: dict[str, Any] = {
            "backend": name,
            "puzzles": len(tokens),
            "depth": depth,
            "early_s": median["residual"],
            "full_s": median["none"],
            "times_as_fast": median["none"] / median["residual"],
            "steps": float(early.steps.double().mean()),
            "settled": int(early.converged.sum()),
            "both_settled": int(settled.sum()),
            "agree": int(agree.sum()),
            "reason": early.backend_reason,
        }
        pairs = {"full depth": (int((~agree).sum()), len(agree))}
        if first is None:
            first = name, early.preds, early.converged
        else:
            both = first[2] & early.converged
            pairs[first[0]] = int((first[1] != early.preds).any(1)[both].sum()), int(both.sum())
        row["disagreements"] = {other: differ for other, (differ, _) in pairs.items()}
        wrong = [
            f"{n} of {of} answers differ from {other}" for other, (n, of) in pairs.items() if n > max(1, of / 1000)
        ]
        yield row | ({"wrong": "; ".join(wrong)} if wrong else {})


def memory(names: list[str], device: str, rows: int, depths: list[int]) -> Rows:
    """Bytes at the highest while solving at each depth: torch's allocations on a GPU, else the process's own."""
    model = EquilibriumReasoner(PRESETS["sudoku-small"]()).to(device)
    tokens = torch.randint(2, 11, (rows, 81), generator=torch.Generator().manual_seed(1)).to(device)
    for name in names:

        def peak(depth: int, name: str = name) -> int:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            model.solve(tokens, depth=depth, halt="none", backend=name, precision="bf16", slots=rows)
            if device == "cuda":
                return torch.cuda.max_memory_allocated()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        try:
            peak(2)
            free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
            peaks = [peak(depth) for depth in depths]
            taken = free - torch.cuda.mem_get_info()[0] if device == "cuda" else 0
        except RuntimeError as error:
            yield {"backend": name, "failure": _headline(error)}
            continue
        growth = peaks[-1] / peaks[0] - 1
        row = {"backend": name, "rows": rows, "depths": depths, "peak_bytes": peaks, "growth": growth}
        row["device_bytes_taken_meanwhile"] = taken
        if device == "cuda" and not math.isclose(peaks[-1], peaks[0], rel_tol=0.01):
            row["wrong"] = f"memory grows with depth: {peaks[0]} bytes at {depths[0]}, {peaks[-1]} at {depths[-1]}"
        yield row


WORK = {f.__name__: f for f in (environment, usable, gemm, outer_step, early_exit, memory)}


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    answers = own_output()
    for row in WORK[name](**arguments):
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    main()
