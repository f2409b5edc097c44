"""`python -m benchmarks.studies.views_needed DEV`: views of a Sudoku until a model calls an answer right.

Each puzzle is solved under one symmetry after the other (`eqr solve --views V --select first --halt q`) until q_halt is
above 0: then the model calls its answer right. It does not know whether it is; what it calls right and is wrong is
counted as such. The answers so far are kept in --state after every view, and a run that was stopped goes on from them.
Puzzles have one solution.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from eqr_kernels import EquilibriumReasoner, ops, solve_views
from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli.puzzles import report_errors, stratified, with_answers
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.scoring import Accuracy
from eqr_kernels.studies.subset import digest
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.common import PuzzleSet, Tokens
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.tasks.views import Views

Answers = list[dict[str, Any]]
"""Of each puzzle: `view`, 1 for the puzzle itself, that was called right, or None; whether it is `right`; `steps`, the
outer steps of all its views."""


def next_view(
    model: EquilibriumReasoner, views: Views, labels: Tokens, answers: Answers, view: int, depth: int
) -> None:
    """Solves the `view`th view, from 1 on, of every puzzle that has no answer yet; labels [N, S]."""
    rows = np.flatnonzero([answer["view"] is None for answer in answers])
    if not len(rows):
        return
    each = solve_views(model, views.at(rows, view - 1), select="first", halt="q", depth=depth)
    right = (each.preds.cpu().numpy() == labels[rows]).all(1)
    for row, called, correct, steps in zip(
        rows.tolist(), each.converged.tolist(), right.tolist(), each.nfe.tolist(), strict=True
    ):
        answers[row]["steps"] += steps
        if called:
            answers[row] |= {"view": view, "right": correct}


def counted(puzzles: PuzzleSet, answers: Answers, views: int) -> dict[str, Any]:
    """What at most so many views give: right, all and by source, and what was called right and is wrong."""
    called = np.array([answer["view"] is not None and answer["view"] <= views for answer in answers])
    right = called & np.array([answer["right"] for answer in answers])
    sources = {
        name: Accuracy(int(right[puzzles.source == name].sum()), int((puzzles.source == name).sum())).as_json()
        for name in np.unique(puzzles.source).tolist()
    }
    return {
        "views": views,
        "right": Accuracy(int(right.sum()), len(answers)).as_json(),
        "called_right_and_wrong": int((called & ~right).sum()),
        "by_source": sources,
    }


def print_table(report: dict[str, Any]) -> None:
    rows = report["at_most"]
    sources = list(rows[0]["by_source"])
    table = Table("views at most", "right", "95 %", *sources, "called right and wrong")
    for row in rows:
        right = row["right"]
        cells = [f"{part['correct']} of {part['total']}" for part in row["by_source"].values()]
        low, high = right["wilson95"]
        interval = f"{100 * low:.0f}-{100 * high:.0f} %"
        wrong = str(row["called_right_and_wrong"])
        table.add_row(str(row["views"]), f"{right['correct']} of {right['total']}", interval, *cells, wrong)
    Console(width=160).print(table)
    print(f"{report['mean_steps']:.0f} outer steps a puzzle")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.studies.views_needed", description="Views until an answer.")
    parser.add_argument("puzzles", type=Path, help="Sudokus with answers and sources")
    parser.add_argument("--model", default="sudoku-paper")
    parser.add_argument("--subset", type=int, default=100, help="puzzles, stratified by source and rating")
    parser.add_argument("--views", type=int, default=128, help="views of a puzzle at most")
    parser.add_argument("--depth", type=int, default=16, help="outer steps of a view")
    parser.add_argument("--state", type=Path, default=Path("views_needed.json"), help="answers so far")
    parser.add_argument("--results", type=Path, help="folder of <device>/views_needed-MODEL.json")
    options = parser.parse_args(arguments)
    model = EquilibriumReasoner.from_pretrained(options.model)
    known, errors = with_answers(*sudoku.load(options.puzzles), SUDOKU)
    report_errors(errors)
    puzzles = stratified(known, min(options.subset, len(known)))
    assert puzzles.labels is not None
    run = {
        "model": options.model,
        "weights_sha256": weights_digest(model),
        "data_sha256": digest(puzzles.inputs, puzzles.labels),
        "puzzles": len(puzzles),
        "depth": options.depth,
        "isa": ops.cpu_isa() if model.device.type == "cpu" else None,
    }
    done, answers = 0, [{"view": None, "right": False, "steps": 0} for _ in range(len(puzzles))]
    if options.state.exists():
        state = json.loads(options.state.read_text())
        if state["run"] != run:
            raise SystemExit(
                f"--state {options.state} is of {state['run']}, and this run is of {run}; name another file"
            )
        done, answers = state["views"], state["answers"]
    views = sudoku.views(puzzles.inputs, options.views)
    for view in range(done + 1, options.views + 1):
        next_view(model, views, puzzles.labels, answers, view, options.depth)
        done = view
        state = {"run": run, "views": view, "answers": answers}
        atomic_write(options.state, json.dumps(state).encode())
        left = sum(answer["view"] is None for answer in answers)
        print(f"view {view}: {left} of {len(answers)} puzzles have no answer", flush=True)
    most = sorted({*(2**k for k in range(done.bit_length())), done})
    report = {
        **machine.provenance("benchmarks.studies.views_needed"),
        **run,
        "torch_threads": torch.get_num_threads(),
        "views": done,
        "mean_steps": float(np.mean([answer["steps"] for answer in answers])),
        "at_most": [counted(puzzles, answers, count) for count in most],
    }
    print_table(report)
    machine.write_report(options.results, f"views_needed-{Path(options.model).stem}", report)


if __name__ == "__main__":
    main()
