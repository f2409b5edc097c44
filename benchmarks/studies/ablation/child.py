"""One row in a process of its own, or with `--rate` its speed alone: `python -m benchmarks.studies.ablation.child`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.studies.ablation import evaluation, training
from benchmarks.studies.ablation.plan import Plan
from benchmarks.studies.ablation.rows import parse_row
from eqr_kernels.tasks import sudoku


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.studies.ablation.child", description="Train and measure one row of a plan."
    )
    parser.add_argument("runs", type=Path, help="the folder of the plan")
    parser.add_argument("row")
    parser.add_argument("--rate", action="store_true", help="print the operations a second of its training, no more")
    options = parser.parse_args()
    plan, choice = Plan.read(options.runs), parse_row(options.row)
    torch.set_num_threads(plan.threads)
    folder = options.runs / choice.folder
    if options.rate:
        rate = training.measure_rate(choice, plan.training, sudoku.load_csv(plan.train_file))
        print(json.dumps({"rate": rate}), flush=True)
        return
    if training.finished(choice, plan.training, folder) is None:
        training.train(choice, plan.training, sudoku.load_csv(plan.train_file), folder)
    evaluation.evaluate(choice, plan.training, plan.evaluation, sudoku.load_csv(plan.dev_file), folder)


if __name__ == "__main__":
    main()
