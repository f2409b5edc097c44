"""Ops by themselves, in one process: turns of the op, of what it replaces, of a copy and of the meter, as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import quotients, ratios, spread
from peers.meter import peak
from peers.workload import Unavailable
from rich.table import Table

from eqr_kernels import ops
from eqr_kernels.run_rules import RunRules

ROUNDS = {False: 15, True: 11}  # by --quick
SECONDS = 0.1
"""Roughly what is timed in a turn, in whole calls."""
MOST_CALLS = 1000
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
Times = dict[str, list[float]]


def full_depth(depth: int, noise_scale: float, slots: int) -> RunRules:
    """One trajectory of each puzzle to the depth, without halting."""
    return RunRules(
        seed=0,
        breadth=1,
        depth=depth,
        halt="none",
        tol=0.0,
        patience=1,
        select="residual",
        window=3,
        noise_scale=noise_scale,
        checkpoints=(),
        slots=slots,
        trace=False,
    )


def turns(candidates: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Seconds a call of each, round by round; there and back again, so that whatever the machine does meets all alike.

    A turn is as many calls as take `SECONDS`, after one that is not timed, which finds the caches cold.
    """
    counts, times = {}, {name: [] for name in candidates}  # type: dict[str, int], Times
    for name, call in candidates.items():
        call()
        counts[name] = max(1, min(MOST_CALLS, math.ceil(SECONDS / max(1e-9, _timed(call, 1)))))
    for number in range(rounds):
        for name in candidates if number % 2 == 0 else reversed(candidates):
            candidates[name]()
            times[name].append(_timed(candidates[name], counts[name]))
    return times


def _timed(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def copying(moved: int) -> Callable[[], object]:
    """A copy of half as many bytes: it reads and writes `moved` bytes together."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


class Peak:
    """The registers' peak as one of the candidates of `turns`; `rates` keeps what it found in each round.

    The turn's untimed call and the two that find its length are left out by `of`.
    """

    def __init__(self, precisions: Sequence[str]) -> None:
        self.precisions = dict.fromkeys(precisions)
        self.rates: list[dict[str, float]] = []
        try:
            self()
            self.missing: str | None = None
        except Unavailable as reason:
            self.missing = str(reason)

    def __call__(self) -> None:
        self.rates.append({p: peak(p, torch.get_num_threads(), SECONDS / 2) for p in self.precisions})

    @property
    def candidate(self) -> dict[str, Callable[[], object]]:
        return {} if self.missing else {"meter": self}

    def of(self, rounds: int) -> list[dict[str, float]]:
        """Operations a second in each precision, a dict for each round; empty where there is no meter."""
        if self.missing:
            return []
        each = (len(self.rates) - 3) // rounds  # calls in a round
        return self.rates[3 + each - 1 :: each]


def op_rows(
    times: Times, precision: str, *, moved: int | None = None, floor: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """A row for each candidate but the copy and the meter: median microseconds and their fifths, and what they reach.

    Args:
        times: with "op", and "copy" where `moved` is given.
        moved: bytes that the op must read and write.
        floor: of each round the seconds that the op's matrix products need at the registers' peak.
    """
    rows = []
    for name, seconds in times.items():
        if name in ("copy", "meter"):
            continue
        row: dict[str, Any] = {"contender": name, "precision": precision, "peer": name != "op", "rounds": len(seconds)}
        row |= spread("us", [1e6 * s for s in seconds])
        if moved is not None:
            row |= {"bytes_moved": moved, **spread("gb_per_s", [moved / s / 1e9 for s in seconds])}
            row |= spread("copy_gb_per_s", [moved / s / 1e9 for s in times["copy"]])
            row |= spread("share_of_copy_bandwidth", quotients(times["copy"], seconds))
        if floor:
            row |= spread("share_of_peak", quotients(list(floor), seconds))
        if name == "op":
            others = {other: t for other, t in times.items() if other not in ("op", "copy", "meter")}
            row |= ratios({other: quotients(t, seconds) for other, t in others.items()})
        rows.append(row)
    return rows


def op_info() -> dict[str, Any]:
    return {"backend": "cpu", "isa": ops.cpu_isa(), "threads": torch.get_num_threads(), "baseline": "eager"}


def op_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A line for each row; the last column says how many times as fast as it the op of its precision is."""
    ours = {row["precision"]: row for row in rows if row["contender"] == "op"}
    shown = Table(title=f"{title}, {torch.get_num_threads()} threads")
    shares = [name for name in ("share_of_peak", "share_of_copy_bandwidth") if any(name in row for row in rows)]
    shown.add_column("contender")
    for name in ("us a call", "its 20-80 %", *(name.replace("_", " ") for name in shares), "the op is faster"):
        shown.add_column(name, justify="right")
    for row in rows:
        ratio = ours.get(row["precision"], {}).get("times_as_fast_as", {}).get(row["contender"])
        shown.add_row(
            f"{row['contender']} {row['precision']}",
            f"{row['us']:.4g}",
            f"{row['us_p20']:.4g}-{row['us_p80']:.4g}",
            *(f"{row[name]:.1%}" if name in row else "" for name in shares),
            "" if ratio is None else f"{ratio:.2f}x",
        )
    return shown
