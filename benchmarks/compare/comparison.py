"""Two runs row by row: what got slower or faster by more than a threshold and by more than their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.measures import AMOUNT, NORMAL, RATIO, SHARE, TIME, Measure, Row, Run

SLOWER, FASTER, SAME, NOISE, NOT_COMPARED = "slower", "faster", "same", "within noise", "not compared"
MACHINE = ("device", "cpu", "threads", "cpu_isa", "torch", "python", "numpy", "extension", "backend", "precision")
"""Where one of these differs, absolute times tell of the machine and not of the code."""


@dataclass(frozen=True)
class Settings:
    """How two runs are compared.

    Attributes:
        threshold: the least relative change that counts, 0.05 is 5 %.
        false_alarms: how often a comparison of two runs of the same code may find any change, about.
        between_runs: standard deviation of a relative measure from one run to another that the rounds of neither
            show: other memory addresses, another phase of the machine.
        force: compare absolute times of different machines and versions too.
    """

    threshold: float = 0.05
    false_alarms: float = 0.05
    between_runs: float = 0.01
    force: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 10:
            raise ValueError(f"threshold must be above 0 and below 10 (0.05 is 5 %), got {self.threshold}")
        if not 0 < self.false_alarms < 1:
            raise ValueError(f"false_alarms must be between 0 and 1, got {self.false_alarms}")
        if not 0 <= self.between_runs < 1:
            raise ValueError(f"between_runs must be from 0 to below 1, got {self.between_runs}")


@dataclass(frozen=True)
class Item:
    """One measure of one row in both runs.

    Attributes:
        factor: cost after over cost before; 1.15 is 15 % slower, or more.
        error: standard error of ln(factor); None where the noise is not known.
        verdict: SLOWER, FASTER, SAME, NOISE (above the threshold, but no more than noise may do) or NOT_COMPARED.
    """

    file: str
    row: str
    peer: bool
    measure: str
    kind: str
    before: float
    after: float
    factor: float
    error: float | None
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs, or two folders of them, have told.

    Attributes:
        limit: how many standard errors a change must be.
        differences: (what, before, after) of machine, versions and commit.
        only_before, only_after: rows and files of one side alone. skipped: files that could not be read, and why.
    """

    settings: Settings
    limit: float
    items: tuple[Item, ...]
    differences: tuple[tuple[str, Any, Any], ...] = ()
    absolute: bool = True
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def counted(self, verdict: str) -> list[Item]:
        """Items of this verdict that are this package's own."""
        return [item for item in self.items if item.verdict == verdict and not item.peer]

    @property
    def judged(self) -> int:
        return sum(item.verdict != NOT_COMPARED and not item.peer for item in self.items)


@dataclass
class _Pair:
    """A measure before and after, and how noisy a round of its like is in either run."""

    file: str
    row: Row
    before: Measure
    after: Measure
    floors: tuple[float, float] = (0.0, 0.0)
    reason: str = ""

    def judge(self, settings: Settings, limit: float) -> Item:
        change = self.after.cost - self.before.cost
        error = None if self.reason else self.error(settings)
        if error is None:
            verdict = NOT_COMPARED
        elif abs(change) <= math.log1p(settings.threshold):
            verdict = SAME
        elif abs(change) <= limit * error:
            verdict = NOISE
        else:
            verdict = SLOWER if change > 0 else FASTER
        reason = self.reason or ("the files do not tell its noise" if error is None else "")
        return Item(
            self.file,
            self.row.name,
            self.row.peer,
            self.before.name,
            self.before.kind,
            self.before.value,
            self.after.value,
            math.exp(change),
            error,
            verdict,
            reason,
        )

    def error(self, settings: Settings) -> float | None:
        """Standard error of ln(factor); None where it is not known."""
        if self.before.deviation is None or self.after.deviation is None:
            return None
        if self.before.deviation == self.after.deviation == 0:
            return 0.0
        variances = (m.variance(floor) for m, floor in zip((self.before, self.after), self.floors, strict=True))
        return math.sqrt(sum(variances) + 2 * settings.between_runs**2)


def compare(runs: Sequence[tuple[Run, Run]], settings: Settings | None = None, **rest: tuple[str, ...]) -> Comparison:
    """Pairs of runs (before, after) as one comparison.

    A measure changes the verdict when its costs differ by more than the threshold, and by more than `limit` standard
    errors of the difference of their logarithms. Of each row the first measure that both have with its noise is judged:
    a share of a peak, then a ratio to a peer, then an absolute time, and besides every amount of bytes or outer steps.
    The standard deviation of a round is that of the row, though no less than the median row's of its run, for few
    rounds often look quieter than they are; `limit` is the normal quantile for `false_alarms`, divided by the number of
    this package's own measures that are not exact (Bonferroni).

    Args:
        rest: only_before, only_after and skipped of the caller, to which this adds.

    Raises:
        ValueError: a pair is of two kinds of results.
    """
    settings = settings or Settings()
    only: dict[str, list[str]] = {"only_before": [], "only_after": []}
    pairs: list[_Pair] = []
    differences: dict[tuple[str, str, str], tuple[str, Any, Any]] = {}
    notes: list[str] = []
    absolute = True
    for before, after in runs:
        if before.kind != after.kind:
            kinds = f"{before.file} is a {before.kind} and {after.file} a {after.kind}"
            raise ValueError(f"{kinds}; compare two of a kind")
        changed = _differences(before, after)
        differences |= {(name, str(a), str(b)): (name, a, b) for name, a, b in changed}
        same_machine = settings.force or not any(name in MACHINE for name, _, _ in changed)
        absolute &= same_machine
        notes += [*before.notes, *after.notes]
        both = [name for name in before.rows if name in after.rows]
        matched = [pair for name in both for pair in _pairs(before, after, name, same_machine)]
        _set_floors(matched)
        pairs += matched
        only["only_before"] += [f"{before.file}: {name}" for name in before.rows if name not in after.rows]
        only["only_after"] += [f"{after.file}: {name}" for name in after.rows if name not in before.rows]
    noisy = sum(not pair.reason and bool(pair.error(settings)) for pair in pairs if not pair.row.peer)
    limit = NORMAL.inv_cdf(1 - settings.false_alarms / (2 * max(1, noisy)))
    items = tuple(pair.judge(settings, limit) for pair in pairs)
    return Comparison(
        settings,
        limit,
        items,
        tuple(differences.values()),
        absolute,
        tuple(only["only_before"]) + rest.get("only_before", ()),
        tuple(only["only_after"]) + rest.get("only_after", ()),
        rest.get("skipped", ()),
        (*dict.fromkeys(notes), *_phase(runs, settings)),
    )


def _differences(before: Run, after: Run) -> list[tuple[str, Any, Any]]:
    """What both say of themselves and differs."""
    names = dict.fromkeys([*before.info, *after.info])
    return [(n, before.info.get(n), after.info.get(n)) for n in names if before.info.get(n) != after.info.get(n)]


def _pairs(before: Run, after: Run, name: str, same_machine: bool) -> list[_Pair]:
    old, new = before.rows[name], after.rows[name]
    both = [(m, new.measures[m.name]) for m in old.of(SHARE, RATIO, TIME) if m.name in new.measures]
    both = [(a, b) for a, b in both if a.kind == b.kind]
    amounts = [(m, new.measures[m.name]) for m in old.of(AMOUNT) if m.name in new.measures]
    known = [p for p in both if p[0].deviation is not None and p[1].deviation is not None]
    usable = [p for p in known if p[0].relative or same_machine] or [p for p in both if p[0].relative] or both
    changed = [key for key in {**old.context, **new.context} if old.context.get(key) != new.context.get(key)]
    reason = "; ".join(f"{key} is {old.context.get(key)} and {new.context.get(key)}" for key in changed)
    return [
        _Pair(after.file, new, a, b, reason=reason or ("" if a.relative or same_machine else _OTHER))
        for a, b in (*usable[:1], *amounts)
    ]


_OTHER = "absolute, and the machine or its versions differ"


def _set_floors(pairs: list[_Pair]) -> None:
    """The median deviation of the rows of either run: of peers and of ours, of each kind of measure, by themselves."""
    groups: dict[tuple[bool, str], list[_Pair]] = {}
    for pair in pairs:
        if pair.before.deviation and pair.after.deviation:
            groups.setdefault((pair.row.peer, pair.before.kind), []).append(pair)
    for group in groups.values():
        floors = (
            statistics.median(p.before.deviation or 0.0 for p in group),
            statistics.median(p.after.deviation or 0.0 for p in group),
        )
        for pair in group:
            pair.floors = floors


def _phase(runs: Sequence[tuple[Run, Run]], settings: Settings) -> list[str]:
    """Whether all absolute times moved together where rows also have a measure that does not move with them."""
    moves = []
    for before, after in runs:
        for name, row in before.rows.items():
            times, other = row.of(TIME), after.rows.get(name)
            if other is not None and row.of(SHARE, RATIO) and times and times[0].name in other.measures:
                moves.append(other.measures[times[0].name].cost - times[0].cost)
    middle = statistics.median(moves) if moves else 0.0
    if abs(middle) <= math.log1p(settings.threshold):
        return []
    moved = f"{math.exp(abs(middle)) - 1:.0%} {'longer' if middle > 0 else 'shorter'}"
    return [
        f"absolute times are {moved} in the median row that also has a share or a ratio, and those are what is judged: "
        "a slow phase of the machine moves the times alone"
    ]
