"""`python -m benchmarks.studies.extreme_mix DEV`: accuracy by depth, weighted to the mix of Sudoku-Extreme.

Our held-out puzzles are four in five of the hardest that are known; those of Sudoku-Extreme, by which others report,
are easier. Its mix is that of 200,000 of its rows by source, and each source has a stand-in:

    73.4 %  forum_hardest_1905, ph_2010 and 11+: the forum's hardest of DEV, which are harder than the two large lists
    23.1 %  unbiased: minimal puzzles of our own generator, weighted by their clues as all minimal puzzles have them
     2.3 %  kaggle: our generator's "medium", which singles decide
     1.2 %  17 clues: those of DEV

Taking clues away at random gives minimal puzzles with 24.4 clues on average, where all that there are have 26.6
(Berthier, "Unbiased statistics of a CSP: a controlled-bias generator", 2009, whose shares of each number of clues are
taken). Those that come up with a number of clues are taken to be like all others that have as many.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from eqr_kernels import EquilibriumReasoner
from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli.puzzles import turns_for
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.recording import record
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.statistics import Z95
from eqr_kernels.tasks import sudoku, sudoku_generator
from eqr_kernels.tasks.common import PuzzleSet
from eqr_kernels.tasks.registry import SUDOKU

OF_DEV = {"forum": "forum_hardest_1905_11plus", "17 clues": "17_clue"}
UNBIASED = 0.231
MINIMAL = {"24 clues or fewer": 0.0243, "25 clues": 0.1342, "26 clues": 0.3194, "27 clues or more": 0.5221}
"""Shares of all minimal puzzles."""
MIX = {
    "forum": 0.734,
    "17 clues": 0.012,
    "kaggle": 0.023,
    **{f"unbiased, {clues}": UNBIASED * share for clues, share in MINIMAL.items()},
}


def minimal(attempts: int, most: int, seed: int) -> PuzzleSet:
    """Of so many minimal puzzles at most so many with each of `MINIMAL`'s clues, named so by their source."""
    made = sudoku_generator.generate(attempts, guesses=(0, None), seed=seed)
    kind = ((made.inputs > sudoku.BLANK).sum(1) - 24).clip(0, 3)
    rows = np.concatenate([np.flatnonzero(kind == k)[:most] for k in range(4)])
    return dataclasses.replace(made.subset(rows), source=np.array([f"unbiased, {[*MINIMAL][k]}" for k in kind[rows]]))


def kept_or_made(path: Path, attempts: int, most: int) -> PuzzleSet:
    """The minimal puzzles that `path` holds, or new ones, which are kept there."""
    if not path.exists():
        made = minimal(attempts, most, seed=1)
        assert made.labels is not None
        questions, answers = map(sudoku.decode, made.inputs), map(sudoku.decode, made.labels)
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["question", "answer", "source"])
        table.writerows(zip(questions, answers, made.source.tolist(), strict=True))
        atomic_write(path, text.getvalue().encode())
    return sudoku.load(path)[0]


def known(path: Path, depths: Sequence[int]) -> dict[str, list[Accuracy]]:
    """Of the parts of DEV, from the last row of each source in a curve.csv of `eqr train --eval-data`."""
    with path.open() as file:
        rows = {row["source"]: row for row in csv.DictReader(file) if row["clues"] == "published"}
    return {part: [_counted(rows[source], d) for d in depths] for part, source in OF_DEV.items()}


def _counted(row: dict[str, str], depth: int) -> Accuracy:
    n = int(row["puzzles"])
    return Accuracy(round(n * float(row[f"exact_{depth}"])), n)


def weighted(parts: dict[str, Accuracy]) -> dict[str, float]:
    """The share of the mix, and its 95 % interval by Agresti and Coull's variances of the parts."""
    share, variance = 0.0, 0.0
    for name, weight in MIX.items():
        part = parts[name]
        share += weight * part.share
        p = (part.correct + 2) / (part.total + 4)
        variance += weight**2 * p * (1 - p) / (part.total + 4)
    reach = Z95 * math.sqrt(variance)
    return {"share": share, "low": max(0.0, share - reach), "high": min(1.0, share + reach)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.extreme_mix", description="Weighted to Sudoku-Extreme's mix.")
    parser.add_argument("dev", type=Path, nargs="?", help="puzzles with answers and sources; or --known")
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--known", type=Path, metavar="CURVE", help="curve.csv of this model, in place of DEV")
    parser.add_argument("--forum", type=int, default=300, help="of DEV's forum puzzles, where they are run")
    parser.add_argument("--seventeen", type=int, default=300, help="of DEV's with 17 clues, where they are run")
    parser.add_argument("--attempts", type=int, default=3000, help="minimal puzzles that are made")
    parser.add_argument("--most", type=int, default=100, help="of these, and easy ones, that are run of a kind")
    parser.add_argument("--minimal", type=Path, default=Path("minimal.csv"), help="kept there, and taken from there")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--halt", choices=("residual", "residual+q", "none"), default="residual", help="at the card's tolerance"
    )
    parser.add_argument("--turn-every", type=int, metavar="STEPS", help="as of `eqr eval`: outer steps between turns")
    parser.add_argument("--results", type=Path, help="folder of <device>/extreme_mix-MODEL[-turn-STEPS][-HALT].json")
    options = parser.parse_args(arguments)
    if (options.dev is None) == (options.known is None):
        parser.error("give DEV, to run some of it, or --known, where its accuracies are: one of the two")
    if options.known is not None and options.turn_every is not None:
        parser.error("--known has accuracies without turns; give DEV with --turn-every")
    depths = sorted(set(options.depths))
    try:
        turns = turns_for(SUDOKU, options.turn_every, depths[-1], seed=0)
    except ValueError as error:
        parser.error(str(error))
    model = EquilibriumReasoner.from_pretrained(options.model)
    own = kept_or_made(options.minimal, options.attempts, options.most)
    sets = {
        name: own.subset(np.flatnonzero(own.source == name)[: options.most]) for name in np.unique(own.source).tolist()
    }
    if len(sets) < len(MINIMAL):
        raise SystemExit(
            f"{options.minimal} has no puzzles for one of {', '.join(MINIMAL)}; remove it, raise --attempts"
        )
    sets["kaggle"] = sudoku_generator.generate(options.most, "medium", seed=1)
    parts: dict[str, list[Accuracy]] = {}
    if options.known is not None:
        parts |= known(options.known, depths)
    else:
        dev = sudoku.load(options.dev)[0]
        for part, most in (("forum", options.forum), ("17 clues", options.seventeen)):
            rows = np.flatnonzero(dev.source == OF_DEV[part])
            sets[part] = dev.subset(np.random.default_rng(0).permutation(rows)[:most])
    steps: dict[str, float] = {}
    for name, puzzles in sets.items():
        assert puzzles.labels is not None
        recording = record(model, puzzles.inputs, puzzles.labels, depths=depths, halt=options.halt, turns=turns)
        parts[name] = [Accuracy.of(right) for right in recording.correct[:, 0].T]
        steps[name] = float(recording.steps[:, 0, -1].mean())
    report = {
        **machine.provenance("benchmarks.studies.extreme_mix"),
        "model": options.model,
        "weights_sha256": weights_digest(model),
        "halt": options.halt,
        "turn_every": options.turn_every,
        "mix": MIX,
        "known": None if options.known is None else str(options.known),
        "depths": depths,
        "parts": {name: [part.as_json() for part in parts[name]] for name in MIX},
        "mean_steps": steps,
        "weighted": [weighted({name: parts[name][k] for name in MIX}) for k in range(len(depths))],
    }
    table = Table("part", "weight", "puzzles", *(f"depth {d}" for d in depths))
    for name, weight in MIX.items():
        cells = [f"{100 * part.share:.1f} %" for part in parts[name]]
        table.add_row(name, f"{100 * weight:.1f} %", str(parts[name][0].total), *cells)
    cells = [f"{100 * w['share']:.1f} % [{100 * w['low']:.1f}-{100 * w['high']:.1f}]" for w in report["weighted"]]
    table.add_row("the mix", "", "", *cells)
    Console(width=160).print(table)
    name = f"extreme_mix-{Path(options.model).stem}"
    name += "" if turns is None else f"-turn-{turns.every}"
    name += "" if options.halt == "residual" else f"-{options.halt}"
    machine.write_report(options.results, name, report)


if __name__ == "__main__":
    main()
