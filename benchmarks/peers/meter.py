"""The machine's own speed: multiply-adds in registers alone, on as many threads as the contenders have."""

from __future__ import annotations

import importlib
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eqr_kernels import ops

from .workload import Unavailable

PRECISIONS = ("fp32", "bf16", "int8")


def peak(precision: str, threads: int, seconds: float = 0.1) -> float:
    """Operations a second of all threads at once (a multiply-add is two): the sum of each thread's median rate.

    The instructions are those of the CPU kernels' tiles, on the instruction set in use: FMA for fp32 (SSE2: a product
    and a sum); for bf16 tdpbf16ps or vdpbf16ps, else as fp32; for int8 tdpbusd or vpdpbusd, else vpmaddwd and
    vpaddd.

    Raises:
        Unavailable: no extension, or no meter for the instruction set.
    """
    built, reason = ops.extension_status()
    if not built:
        raise Unavailable(reason)
    extension: Any = importlib.import_module("eqr_kernels._C")

    ready = threading.Barrier(threads)

    def measure(_: int) -> list[float]:
        ready.wait()
        return list(extension.peak(precision, seconds))

    with ThreadPoolExecutor(threads) as pool:
        rates = list(pool.map(measure, range(threads)))
    if not all(rates):
        raise Unavailable(f"there is no meter for {ops.cpu_isa()} here: it is emulated, or of another processor")
    return sum(map(statistics.median, rates))


class Meter:
    """The contender that only measures the peaks."""

    info: dict[str, Any] = {}

    def __init__(self, threads: int) -> None:
        self.threads = threads
        for precision in PRECISIONS:  # or raises now
            peak(precision, threads, seconds=0.01)

    def turn(self) -> dict[str, Any]:
        return {"peak": {precision: peak(precision, self.threads) for precision in PRECISIONS}}
