"""`python -m benchmarks.studies.ablation`: trains every row on the same budget, measures it, and writes the table.

Each row has a process of its own. A row that is finished in --runs is not trained again, and stands in the table
whether or not it was asked for; to train one with other settings, name another folder. Exit codes: 0 all rows that were
asked for are in the table, 1 one failed or nothing could be done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu_check.child import ROOT, run
from benchmarks.studies.ablation import evaluation, table, training
from benchmarks.studies.ablation.plan import FILE, Plan, sha256
from benchmarks.studies.ablation.rows import FORMULA, ROWS, Choice, parse_row, training_steps
from benchmarks.studies.ablation.settings import EvaluationSettings, TrainingSettings, parse_curriculum
from eqr_kernels import EqRConfig
from eqr_kernels.atomic import atomic_write
from eqr_kernels.commit import code_commit

_DAY = 86_400.0
_MAIN = ["feed-forward", "tied", "tied-online", "trm", "eqr"]
_TINY: dict[str, Any] = dict(layers=2, batch_size=4, micro_batch=2, compile=False)
_TINY_CONFIG: dict[str, Any] = dict(hidden_size=16, num_heads=2, H_cycles=2, L_cycles=1, halt_max_steps=2)
_TINY_EVALUATION: dict[str, Any] = dict(puzzles=3, clues=(60, 0), depths=(1, 2), passes=(1, 2), breadth=2)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    common, measured = TrainingSettings(), EvaluationSettings()
    parser = argparse.ArgumentParser(
        "benchmarks.studies.ablation",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="From a feed-forward network to EqR, each row with the same training compute.",
        epilog="rows:\n" + "\n".join(f"  {name}: {row.title}: {row.description}" for name, row in ROWS.items()),
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="budget: what the last row does in this time, as measured here")
    budget.add_argument("--petaflop", type=float, help="budget: this many 10^15 operations a row")
    parser.add_argument("--rows", nargs="+", default=_MAIN, metavar="ROW", help="as in eqr or feed-forward:layers=8")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the EqRConfig; default: the preset sudoku-small",
    )
    parser.add_argument("--layers", type=int, default=common.layers, help="block applications of a single pass")
    parser.add_argument("--batch", type=int, default=common.batch_size)
    parser.add_argument("--micro-batch", type=int, default=common.micro_batch, help="of it, in memory in a stack")
    parser.add_argument("--lr", type=float, default=common.lr)
    parser.add_argument("--lr-min-ratio", type=float, default=common.lr_min_ratio)
    parser.add_argument("--weight-decay", type=float, default=common.weight_decay)
    parser.add_argument("--curriculum", default=common.curriculum, help="SHARE:LOW-HIGH,... in shares of the steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=common.forward_dtype)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=common.seed)
    parser.add_argument("--puzzles", type=int, default=measured.puzzles, help="of dev.csv.gz")
    parser.add_argument("--clues", type=_counts, default=measured.clues, help="levels; 0 is as published")
    parser.add_argument("--depths", type=_counts, default=measured.depths)
    parser.add_argument("--passes", type=_counts, default=measured.passes, help="depths of the row tied")
    parser.add_argument("--breadth", type=int, default=measured.breadth)
    parser.add_argument("--precision", default=measured.precision, help="of solve: auto, fp32, bf16")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data" / "sudoku",
        help="folder of train.csv.gz and dev.csv.gz",
    )
    parser.add_argument("--runs", type=Path, help="folder of the trained rows; default: runs/ablation")
    parser.add_argument("--results", type=Path, help="folder of <device>/ablation.json; default: benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and a few steps; measures nothing")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of this file, and do no more")
    options = parser.parse_args(given)
    if options.dry_run:
        # A dry run leaves nothing where measurements are kept.
        options.petaflop, options.minutes = 4e-7, None
        options.runs = options.runs or Path(tempfile.mkdtemp(prefix="ablation-dry-run-"))
        options.results = options.results or options.runs / "results"
    options.runs = options.runs or ROOT / "runs" / "ablation"
    options.results = options.results or ROOT / "benchmarks" / "results"
    if options.table is None and not (options.minutes or options.petaflop):
        parser.error("give --minutes or --petaflop")
    for name in ("minutes", "petaflop"):
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name):g}")
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    """What the command line asks for, the budget aside where it is to be measured.

    Raises:
        ValueError, FileNotFoundError: something is wrong with it.
    """
    fields: dict[str, Any] = {}
    for change in options.changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set must be FIELD=VALUE, as in hidden_size=256, got {change!r}")
        fields[name] = json.loads(text)
    files = [options.data / f"{name}.csv.gz" for name in ("train", "dev")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; name the folder of train.csv.gz and dev.csv.gz in --data")
    train = TrainingSettings(
        config=EqRConfig.sudoku_small(**fields),
        budget=(options.petaflop or 0) * 1e15,
        data_sha256=sha256(files[0]),
        layers=options.layers,
        batch_size=options.batch,
        micro_batch=options.micro_batch,
        lr=options.lr,
        lr_min_ratio=options.lr_min_ratio,
        weight_decay=options.weight_decay,
        curriculum=options.curriculum,
        forward_dtype=options.dtype,
        compile=options.compile,
        seed=options.seed,
    )
    measured = EvaluationSettings(
        data_sha256=sha256(files[1]),
        puzzles=options.puzzles,
        clues=options.clues,
        depths=options.depths,
        passes=options.passes,
        breadth=options.breadth,
        precision=options.precision,
        seed=options.seed,
    )
    if options.dry_run:
        config = dataclasses.replace(train.config, **_TINY_CONFIG)
        train = dataclasses.replace(train, config=config, **_TINY)
        measured = dataclasses.replace(measured, **_TINY_EVALUATION)
    parse_curriculum(train.curriculum, 1)
    rows = tuple(parse_row(text) for text in options.rows)
    return Plan(train, measured, rows, files[0], files[1], options.minutes, torch.get_num_threads())


def with_budget(plan: Plan, runs: Path) -> Plan:
    """The plan with its budget: measured for its minutes, once for all rows that are trained into `runs`."""
    if plan.minutes is None:
        return plan
    if (runs / FILE).is_file() and (before := Plan.read(runs)).minutes == plan.minutes:
        budget = before.training.budget
    else:
        plan.write(runs)
        lines: list[str] = []
        _child(runs, plan.rows[-1], lines.append, "--rate")
        # Rounded, so that it can be given by hand as --petaflop.
        budget = float(f"{json.loads(lines[-1])['rate'] * 60 * plan.minutes:.3g}")
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, budget=budget))


def _child(runs: Path, choice: Choice, on_line: Any, *more: str) -> None:
    """Runs one row's process to its end.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.studies.ablation.child", str(runs.resolve()), choice.key, *more]
    ended = run(command, _DAY, on_line)
    if ended.why:
        raise RuntimeError(f"{choice.key}: {ended.why}")


def report(plan: Plan, runs: Path, dry_run: bool) -> dict[str, Any]:
    """What all rows in `runs` that were trained and measured as the plan says have come to, in the order of `ROWS`."""
    order = list(ROWS)
    settings = json.loads(json.dumps(plan.evaluation.to_json()))
    rows, others = [], []
    for file in runs.glob(f"*/{evaluation.RECORD}"):
        measured = json.loads(file.read_text())
        choice = parse_row(measured["row"])
        try:
            trained = training.finished(choice, plan.training, file.parent)
        except ValueError:
            trained = None
        if trained is not None and measured["settings"] == settings:
            rows.append({"row": choice.key, "training": trained, "evaluation": measured})
        else:
            others.append(choice.key)
    rows.sort(key=lambda row: (order.index(parse_row(row["row"]).name), row["row"]))
    return {
        "dry_run": dry_run,
        "machine": machine.information(),
        "commit": code_commit(),
        "command": shlex.join(["python", "-m", "benchmarks.studies.ablation", *sys.argv[1:]]),
        "budget": plan.training.budget,
        "formula": FORMULA,
        "training": plan.training.to_json(),
        "evaluation": plan.evaluation.to_json(),
        "data": {"train": plan.train_file.name, "dev": plan.dev_file.name},
        "rows": rows,
        "left_out": sorted(others),
    }


def main() -> int:
    options = arguments()
    if options.table is not None:
        print(table.markdown(json.loads(options.table.read_text())))
        return 0
    plan = with_budget(plan_of(options), options.runs)
    print(f"budget: {plan.training.budget / 1e15:.4g} petaflop a row", flush=True)
    for choice in plan.rows:
        # Before the first row is trained: a budget may be too small, or a folder may hold another run.
        print(f"  {choice.key}: {training_steps(choice.row, choice.settings(plan.training)):,} steps", flush=True)
        training.finished(choice, plan.training, options.runs / choice.folder)
    plan.write(options.runs)
    failed = []
    path = options.results / machine.folder() / "ablation.json"
    for choice in plan.rows:
        try:
            _child(options.runs, choice, lambda line: print(line, flush=True))
        except RuntimeError as error:
            failed.append(str(error))
            print(error, file=sys.stderr, flush=True)
            continue
        content = report(plan, options.runs, options.dry_run)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
    if path.is_file():
        print(f"\n{table.markdown(json.loads(path.read_text()))}\n\n{path}", flush=True)
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
