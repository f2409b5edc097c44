"""One preset at one batch size: the contenders' turns, and the rows that become JSON and a table."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import OURS
from peers.process import Failed, Process
from peers.workload import PRESETS, Operations, has_bf16, operations

PRECISIONS = ("fp32", "bf16", "int8")
# On 2 cores with AVX-512-BF16, in bf16 (int8) against bf16 peers; per preset and batch, None is any batch.
GOALS: dict[tuple[str, int | None, str], dict[str, float]] = {
    ("sudoku-paper", 1, "bf16"): {"share_of_peak": 0.88, "times_as_fast": 1.8},
    ("sudoku-paper", 8, "bf16"): {"share_of_peak": 0.88, "times_as_fast": 1.35},
    ("sudoku-paper", 1, "int8"): {"times_as_fast": 2.7},
    ("sudoku-paper", 8, "int8"): {"times_as_fast": 2.1},
    ("maze", None, "bf16"): {"times_as_fast": 1.5},
}


def main_precision() -> str:
    """What the goals are compared in: bf16 where PyTorch too has instructions for it, else fp32 for all alike."""
    return "bf16" if has_bf16() else "fp32"


def goal(preset: str, batch: int, precision: str) -> dict[str, float]:
    if precision == main_precision():
        precision = "bf16"
    elif precision != "int8":
        return {}
    return GOALS.get((preset, batch, precision)) or GOALS.get((preset, None, precision)) or {}


@dataclass
class Contender:
    """One process and the answers of its turns."""

    name: str
    precision: str
    process: Process | None
    info: dict[str, Any]
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"

    def seconds(self, key: str = "seconds") -> list[float]:
        return [turn[key] for turn in self.turns]


class Field:
    """All contenders of one preset and batch size, alive at once; use as a context manager.

    Args:
        precisions: of the CPU kernel. peers: names of `peers.PEERS`, or "reference", which run in the main precision.
    """

    ours = frozenset(OURS)

    def __init__(self, preset: str, batch: int, threads: int, precisions: list[str], peers: list[str]) -> None:
        self.preset, self.batch, self.threads = preset, batch, threads
        self.operations = operations(PRESETS[preset]())
        self.wanted = [("meter", "all"), *(("cpu", p) for p in precisions), *((p, main_precision()) for p in peers)]
        self.contenders: list[Contender] = []
        self._stack = ExitStack()

    def __enter__(self) -> Field:
        try:
            cache = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            for name, precision in self.wanted:
                self.contenders.append(self._start(name, precision, cache))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, name: str, precision: str, cache: Path) -> Contender:
        sizes = ["--preset", self.preset, "--batch", str(self.batch), "--threads", str(self.threads)]
        try:
            process = Process(*self._command(name, precision), *sizes, threads=self.threads, cache=cache)
        except Failed as failure:
            # Wrong results must fail; a peer that does not work here is a gap in the table.
            if name in self.ours or name == "meter" or "AssertionError" in str(failure):
                raise
            return Contender(name, precision, None, {"skipped": f"failed: {failure}"})
        self._stack.enter_context(process)
        return Contender(name, precision, None if "skipped" in process.info else process, process.info)

    def _command(self, name: str, precision: str) -> list[str]:
        return ["benchmarks.peers.run", name, *([] if name == "meter" else ["--dtype", precision])]

    def take_turns(self, rounds: int, each: Callable[[], object] = lambda: None) -> None:
        """Each contender once a round, there and back again, so that a drift of the machine favours none."""
        for number in range(rounds):
            order = [c for c in self.contenders if c.process is not None]
            for contender in order if number % 2 == 0 else reversed(order):
                assert contender.process is not None
                contender.turns.append(contender.process.request())
                each()

    def find(self, name: str, precision: str) -> Contender:
        return next(c for c in self.contenders if (c.name, c.precision) == (name, precision))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each contender; times are medians over the rounds, and ratios medians of each round's ratio."""
        rows = [self._row(c) for c in self.contenders if c.name != "meter"]
        meter = self.find("meter", "all")
        peaks = [turn["peak"] for turn in meter.turns]
        for row, contender in zip(rows, (c for c in self.contenders if c.name != "meter"), strict=True):
            if contender.turns and peaks:
                row |= self._share(contender, peaks)
        return rows

    def _row(self, contender: Contender) -> dict[str, Any]:
        info = {key: value for key, value in contender.info.items() if key not in ("contender", "dtype")}
        row: dict[str, Any] = {"contender": contender.name, "precision": contender.precision, **info}
        row |= {"preset": self.preset, "batch": self.batch, "threads": self.threads}
        row["peer"] = contender.name not in OURS
        if not contender.turns:
            return row
        row["rounds"] = len(contender.turns)
        for key, name in (("seconds", "ms_per_trajectory_step"), ("solve_seconds", "ms_per_trajectory_step_of_solve")):
            if key in contender.turns[0]:
                row |= spread(name, [seconds / self.batch * 1e3 for seconds in contender.seconds(key)])
        if contender.name == "cpu":
            values_by_peer, row["notes"] = self._ratios(contender)
            row |= values_by_peer
            wanted = goal(self.preset, self.batch, contender.precision)
            if wanted:
                row["goal"] = wanted
                row["goal_is_for_this_machine"] = has_bf16() and self.threads == 2
        return row

    def _ratios(self, ours: Contender) -> tuple[dict[str, Any], list[str]]:
        main = main_precision()
        if ours.precision not in (main, "int8"):
            return ratios({}), [f"not compared: the peers run in {main}, as {_why_main()}"]
        notes = [f"the peers run in {main}, as {_why_main()}"] if main == "fp32" else []
        others = [c for c in self.contenders if c.name not in ("cpu", "meter") and c.turns]
        return ratios({c.name: quotients(c.seconds(), ours.seconds()) for c in others}), notes

    def _share(self, contender: Contender, peaks: list[dict[str, float]]) -> dict[str, Any]:
        shares = [
            share_of_peak(self.operations, contender.precision, peak, seconds / self.batch)
            for peak, seconds in zip(peaks, contender.seconds(), strict=True)
        ]
        rate = self.operations.total * self.batch / statistics.median(contender.seconds())
        return {
            "gop_per_s": round(rate / 1e9, 1),
            "peak_gop_per_s": {p: spread("median", [peak[p] / 1e9 for peak in peaks]) for p in PRECISIONS},
            **spread("share_of_peak", shares),
        }


def _why_main() -> str:
    if has_bf16():
        return "this machine has bf16 instructions"
    return "this machine has no bf16 instructions, and PyTorch's bf16 is a hundred times as slow without them"


def share_of_peak(cost: Operations, precision: str, peak: dict[str, float], seconds: float) -> float:
    """The time that an outer step's products need at the registers' peak, over the `seconds` that it took.

    With int8 operands the mixer's products stay in bf16, and count at its peak.

    Args:
        peak: operations a second in each precision.
    """
    mixer = "bf16" if precision == "int8" else precision
    return (cost.channel / peak[precision] + cost.mixer / peak[mixer]) / seconds


def quotients(theirs: list[float], mine: list[float]) -> list[float]:
    """Round by round, how many times as fast as theirs mine is."""
    return [a / b for a, b in zip(theirs, mine, strict=True)]


def ratios(against: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """`times_as_fast_as` of a row, with its first and last fifth, from the quotients of each round, by peer."""
    values_by_peer = {peer: spread("times_as_fast_as", values) for peer, values in against.items()}
    names = ("times_as_fast_as", "times_as_fast_as_p20", "times_as_fast_as_p80")
    return {name: {peer: values[name] for peer, values in values_by_peer.items()} for name in names}


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median and the first and last fifth of at least two values, rounded to four digits."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    summary = {name: statistics.median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[-1]}
    return {key: float(f"{value:.4g}") for key, value in summary.items()}
