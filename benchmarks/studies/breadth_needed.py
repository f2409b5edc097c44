"""`python -m benchmarks.studies.breadth_needed DEV`: trajectories of a Sudoku until a model calls an answer right.

Each puzzle is solved under one symmetry after the other (`eqr solve --views B --select first --halt q`), or with
--by starts from one random start after the other (`eqr solve --seed 0`, 1, ...), until q_halt is above 0: then the
model calls its answer right. It does not know whether it is; what it calls right and is wrong is counted as such. With
--until converged its residual must be at most the card's tolerance as well (`--halt residual+q`). With --until valid
trajectories halt by q_halt, and the first answer that keeps the rules is taken, whatever the model calls it: the rules
are known to the task, not to the network. With --turn-every each trajectory turns as it goes, see `solve`. The
answers so far are kept in --state after every trajectory of all puzzles, and a run that was stopped goes on from them.
Puzzles have one solution.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from eqr_kernels import EquilibriumReasoner, SolveResult, ops, solve_views
from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli.puzzles import report_errors, stratified, turns_for, with_answers
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.subset import digest
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet, Tokens
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.views import int64

Answers = list[dict[str, Any]]
"""Of each puzzle: `trajectory`, counted from 1, whose answer was taken, or None; whether it is `right`; `steps`, the
outer steps of all its trajectories."""
Rows = npt.NDArray[np.intp]
Solve = Callable[[Rows, int], SolveResult]
"""Of rows [n] and a number from 1 on: runs that trajectory of these puzzles; the result's answers are the puzzles'."""


SUBSET = 100


def by_views(model: EquilibriumReasoner, inputs: Tokens, breadth: int, **options: Any) -> Solve:
    views = sudoku.views(inputs, breadth)
    return lambda rows, number: solve_views(model, views.at(rows, number - 1), select="first", **options)


def by_starts(model: EquilibriumReasoner, inputs: Tokens, _breadth: int, **options: Any) -> Solve:
    return lambda rows, number: model.solve(int64(inputs[rows]), seed=number - 1, **options)


BY: dict[str, Callable[..., Solve]] = {"views": by_views, "starts": by_starts}
HALT = {"called": "q", "converged": "residual+q", "valid": "q"}
"""Of --until, when a trajectory stops."""


def next_trajectory(solve: Solve, puzzles: PuzzleSet, answers: Answers, number: int, until: str) -> None:
    """Runs trajectory `number` of every puzzle that has no answer yet, and takes what is called right or is valid."""
    rows = np.flatnonzero([answer["trajectory"] is None for answer in answers])
    if not len(rows):
        return
    assert puzzles.labels is not None
    result = solve(rows, number)
    preds = result.preds.cpu().numpy()
    right = (preds == puzzles.labels[rows]).all(1)
    taken = sudoku.is_solution(puzzles.inputs[rows], preds) if until == "valid" else result.converged.cpu().numpy()
    for row, take, correct, steps in zip(
        rows.tolist(), taken.tolist(), right.tolist(), result.nfe.tolist(), strict=True
    ):
        answers[row]["steps"] += steps
        if take:
            answers[row] |= {"trajectory": number, "right": correct}


def counted(puzzles: PuzzleSet, answers: Answers, breadth: int) -> dict[str, Any]:
    """What at most so many trajectories give: right, all and by source, and what was taken and is wrong."""
    taken = np.array([answer["trajectory"] is not None and answer["trajectory"] <= breadth for answer in answers])
    right = taken & np.array([answer["right"] for answer in answers])
    sources = {
        name: Accuracy.of(right[puzzles.source == name]).as_json() for name in np.unique(puzzles.source).tolist()
    }
    return {
        "breadth": breadth,
        "right": Accuracy.of(right).as_json(),
        "taken_and_wrong": int((taken & ~right).sum()),
        "by_source": sources,
    }


def print_table(report: dict[str, Any]) -> None:
    rows = report["at_most"]
    sources = list(rows[0]["by_source"])
    table = Table(f"{report['by']} at most", "right", "95 %", *sources, "taken and wrong")
    for row in rows:
        right = row["right"]
        cells = [f"{part['correct']} of {part['total']}" for part in row["by_source"].values()]
        low, high = right["wilson95"]
        interval = f"{100 * low:.0f}-{100 * high:.0f} %"
        wrong = str(row["taken_and_wrong"])
        table.add_row(str(row["breadth"]), f"{right['correct']} of {right['total']}", interval, *cells, wrong)
    Console(width=160).print(table)
    print(f"{report['mean_steps']:.0f} outer steps a puzzle")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.breadth_needed", description="Trajectories until an answer.")
    parser.add_argument("puzzles", type=Path, help="Sudokus with answers and sources")
    parser.add_argument("--model", default="sudoku-paper")
    parser.add_argument("--subset", type=int, default=SUBSET, help="puzzles, stratified by source and rating")
    parser.add_argument("--by", choices=BY, default="views", help="symmetries of the puzzle, or random starts")
    parser.add_argument(
        "--until",
        choices=HALT,
        default="called",
        help="the model calls it right; it does and has settled; or the answer keeps the rules",
    )
    parser.add_argument("--breadth", type=int, default=128, help="trajectories of a puzzle at most")
    parser.add_argument("--depth", type=int, default=16, help="outer steps of a trajectory")
    parser.add_argument("--turn-every", type=int, help="outer steps between turns; else there are none")
    parser.add_argument(
        "--state",
        type=Path,
        help="answers so far; else in breadth_needed-MODEL-BY-DEPTH-UNTIL[-turn-STEPS][-SUBSET].json",
    )
    parser.add_argument("--results", type=Path, help="folder of <device>/breadth_needed-*.json, named alike")
    options = parser.parse_args(arguments)
    try:
        turns = turns_for(SUDOKU, options.turn_every, options.depth, seed=0)
    except ValueError as error:
        parser.error(str(error))
    model = EquilibriumReasoner.from_pretrained(options.model)
    known, errors = with_answers(*sudoku.load(options.puzzles), SUDOKU)
    report_errors(errors)
    puzzles = stratified(known, min(options.subset, len(known)))
    run = {
        "model": options.model,
        "weights_sha256": weights_digest(model),
        "data_sha256": digest(puzzles.inputs, puzzles.labels),
        "puzzles": len(puzzles),
        "by": options.by,
        "depth": options.depth,
        "until": options.until,
        **({} if options.turn_every is None else {"turn_every": options.turn_every}),
        "isa": ops.cpu_isa() if model.device.type == "cpu" else None,
    }
    name = f"breadth_needed-{Path(options.model).stem}-{options.by}-{options.depth}-{options.until}"
    name += "" if options.turn_every is None else f"-turn-{options.turn_every}"
    name += "" if len(puzzles) == SUBSET else f"-{len(puzzles)}"
    kept = options.state or Path(f"{name}.json")
    done, answers = 0, [{"trajectory": None, "right": False, "steps": 0} for _ in range(len(puzzles))]
    if kept.exists():
        state = json.loads(kept.read_text())
        if state["run"] != run:
            raise SystemExit(f"--state {kept} is of {state['run']}, and this run is of {run}; name another file")
        done, answers = state["breadth"], state["answers"]
    solve = BY[options.by](
        model, puzzles.inputs, options.breadth, halt=HALT[options.until], depth=options.depth, turns=turns
    )
    for number in range(done + 1, options.breadth + 1):
        next_trajectory(solve, puzzles, answers, number, options.until)
        done = number
        atomic_write(kept, json.dumps({"run": run, "breadth": done, "answers": answers}).encode())
        left = sum(answer["trajectory"] is None for answer in answers)
        print(f"{done} {options.by}: {left} of {len(answers)} puzzles have no answer", flush=True)
    breadths = sorted({*(2**k for k in range(done.bit_length())), done})
    report = {
        **machine.provenance("benchmarks.studies.breadth_needed"),
        **run,
        "torch_threads": torch.get_num_threads(),
        "breadth": done,
        "mean_steps": float(np.mean([answer["steps"] for answer in answers])),
        "at_most": [counted(puzzles, answers, count) for count in breadths],
    }
    print_table(report)
    machine.write_report(options.results, name, report)


if __name__ == "__main__":
    main()
