"""Grids and tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from eqr_kernels.cli.render.wording import percent

if TYPE_CHECKING:
    from eqr_kernels.cli.puzzles import Task
    from eqr_kernels.results import SolveResult
    from eqr_kernels.studies.noise_choice import NoiseChoice
    from eqr_kernels.studies.scoring import Accuracy
    from eqr_kernels.studies.tolerance import Tolerance
    from eqr_kernels.tasks.common import PuzzleSet, Tokens

_LEGEND = "Givens are dim, what was filled in is bright, and what breaks a rule is red.\n"
_PLAIN_LEGEND = "The puzzle on the left, its answer on the right.\n"


def _console() -> Console:
    return Console(highlight=False, emoji=False)


def puzzles(
    task: Task, puzzle_set: PuzzleSet, result: SolveResult | None, rows: Sequence[dict[str, Any]], grids: bool
) -> None:
    """Each answer in its grid, or on a line of its own."""
    if result is None:
        return
    console = _console()
    if not grids:
        for row in rows:
            console.print(f"{_name(row)}: {', '.join(_outcome(row))}", markup=False, soft_wrap=True)
        return
    coloured = console.color_system is not None
    console.print(_LEGEND if coloured else _PLAIN_LEGEND, style="italic")
    preds = result.preds.cpu().numpy().astype(np.uint8)
    panels = []
    for inputs, answer, row in zip(puzzle_set.inputs, preds, rows, strict=True):
        grid = _grid(task, inputs, answer) if coloured else _side_by_side(task, inputs, answer)
        text = "\n".join([grid, "", *_outcome(row)])
        colour = "green" if row["valid"] else "red"
        panels.append(Panel(text, title=Text(_name(row)), title_align="left", border_style=colour, expand=False))
    console.print(Columns(panels))


def _name(row: dict[str, Any]) -> str:
    place = f"puzzle {row['number']}" if row["line"] is None else f"line {row['line']}"
    source = row["source"].removeprefix("generated_")
    return f"{place} {source}" if row["line"] is None and source else place


def _outcome(row: dict[str, Any]) -> list[str]:
    steps = f"{row['steps']} step" + "s" * (row["steps"] != 1)
    verdict = "solved" if row["valid"] else "not solved"
    if row["other_valid"]:
        verdict = "another solution"
    counted = {"none": ["it has no solution"], "several": ["it has several solutions"]}.get(row["solutions"], [])
    if counted and row["valid"] and not row["other_valid"]:
        verdict = "filled by the rules"  # solved is what has one solution
    end = row["status"].replace("_", " ")
    if row["converged"]:
        fired = "settled" if row["status"] == "converged" else end
        end = fired if row["valid"] else f"{fired} on an answer that breaks the rules"
    return [f"{verdict}, {steps}", f"residual {row['residual']:.4f}", end, *counted]


def _grid(task: Task, inputs: Tokens, answer: Tokens) -> str:
    given, wrong = inputs != task.open_token, task.wrong_cells(inputs, answer)

    def mark(cell: int, character: str) -> str:
        style = "bold red" if wrong[cell] else "dim" if given[cell] else "bold cyan"
        return f"[{style}]{escape(character)}[/{style}]"

    return task.draw(answer, mark)


def _side_by_side(task: Task, inputs: Tokens, answer: Tokens) -> str:
    grids = [escape(task.draw(tokens)).split("\n") for tokens in (inputs, answer)]
    width = max(map(len, grids[0]))
    return "\n".join(f"{left:{width}}   {right}".rstrip() for left, right in zip_longest(*grids, fillvalue=""))


def by_depth(rows: Sequence[dict[str, Any]]) -> None:
    """`eqr solve --by-depth`: right answers at each checkpoint."""
    if not rows:
        return
    answered = any(row["with_answers"] for row in rows)
    table = Table(title="answers by depth", title_justify="left")
    for name in ("depth", *(["exact"] * answered), "valid", "settled", "steps spent"):
        table.add_column(name, justify="right")
    for row in rows:
        n = row["puzzles"]
        exact = [_share(row["correct"], row["with_answers"])] * answered
        settled = _share(row["converged"], n)
        if row["converged_invalid"]:
            settled += f"\n{row['converged_invalid']} break the rules"
        table.add_row(str(row["depth"]), *exact, _share(row["valid"], n), settled, f"{row['nfe']:,}")
    _console().print(table)


def _share(count: int, total: int) -> str:
    return f"{percent(count / total if total else math.nan)} ({count}/{total})"


def summary(totals: dict[str, Any]) -> None:
    """`eqr solve`: what it cost and what came of it."""
    n, without_exit = totals["puzzles"], totals["nfe_without_early_exit"]
    unread = f" (unreadable lines: {totals['unread']})" if totals["unread"] else ""
    ambiguous = totals["filled_ambiguous"]
    filled = f"; filled by the rules, of several solutions: {ambiguous}" if ambiguous else ""
    _console().print(f"solved {totals['solved']} of {n}{filled}{unread}", style="bold")
    if totals["with_answers"]:
        others = totals["other_valid"]
        also = f"; {others} more are another valid solution" if others else ""
        lines(f"equal to the known answer: {totals['correct']} of {totals['with_answers']}{also}")
    if n:
        invalid = totals["converged_invalid"]
        broken = f", {invalid} of them on an answer that breaks the rules" if invalid else ""
        lines(
            f"settled: {totals['converged']} of {n}{broken}; mean steps {totals['mean_steps']:.1f}",
            f"outer steps spent (NFE): {totals['nfe']:,}; without early exit {without_exit:,}, "
            f"{without_exit / max(1, totals['nfe']):.1f} times as many",
            f"seconds: {totals['seconds']:.1f}",
        )


def accuracy(title: str, depths: Sequence[int], groups: dict[str, list[Accuracy]]) -> None:
    """`eqr eval`: a row for each group, a column for each depth, with 95 % intervals below."""
    caption = "exact accuracy in %, with its Wilson 95 % interval"
    table = Table(title=title, title_justify="left", caption=caption, show_lines=True)
    table.add_column("")
    table.add_column("puzzles", justify="right")
    for depth in depths:
        table.add_column(f"depth {depth}", justify="right")
    for name, accuracies in groups.items():
        cells = [f"{100 * a.share:.1f}\n{100 * a.interval[0]:.1f}-{100 * a.interval[1]:.1f}" for a in accuracies]
        table.add_row(Text(name), str(accuracies[0].total), *cells)
    _console().print(table)


def coupling(rows: Sequence[dict[str, Any]]) -> None:
    """`eqr eval`: how far residual and score tell right from wrong, at each depth."""
    known = rows[0]["settled"] is not None
    caption = f"over {rows[0]['trajectories']:,} trajectories; rho is with the share of cells that are right"
    if any(math.isnan(row["residual_auroc"]) for row in rows):
        caption += "; - where all or none are right, so that nothing can be cells apart"
    table = Table(title="residual and score against being right", title_justify="left", caption=caption)
    names = ("AUROC\nresidual", "rho\nresidual", "AUROC\nscore", "rho\nscore")
    for name in ("depth", "right", *(["settled", "right when\nsettled"] * known), *names):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [percent(row["right"] / row["trajectories"])]
        if known:
            settled = row["settled"]
            shares.append(percent(settled / row["trajectories"]))
            shares.append(percent(row["settled_right"] / settled if settled else math.nan))
        cells = (row[f"{by}_{what}"] for by in ("residual", "score") for what in ("auroc", "spearman"))
        table.add_row(str(row["depth"]), *shares, *("-" if math.isnan(x) else f"{x:.3f}" for x in cells))
    _console().print(table)


def modes(title: str, groups: dict[str, dict[str, int]], broad: float) -> None:
    """`eqr eval`: how many puzzles of each group are in each mode."""
    caption = f"broad: at least {100 * broad:g} % of the restarts have settled on the right answer"
    table = Table(title=title, title_justify="left", caption=caption)
    table.add_column("")
    table.add_column("puzzles", justify="right")
    for mode in groups["all"]:
        table.add_column(mode, justify="right")
    for name, counts in groups.items():
        total = sum(counts.values())
        shares = (f"{count} ({percent(count / total if total else math.nan)})" for count in counts.values())
        table.add_row(Text(name), str(total), *shares)
    _console().print(table)


def tolerances(rows: Sequence[Tolerance], puzzles: int, trusted: Tolerance | None, fast: Tolerance | None) -> None:
    """`eqr calibrate`: what each tolerance costs."""
    table = Table(title="tolerances", title_justify="left")
    for name in ("", "tol", "exact", "lost", "gained", "mean steps", "settled", "right when settled"):
        table.add_column(name, justify="right" if name else "left")
    for t in rows:
        names = [name for name, chosen in (("tol", trusted), ("tol_fast", fast)) if t == chosen]
        table.add_row(
            ", ".join(names),
            f"{t.tol:.3g}",
            percent(t.correct / puzzles),
            str(t.lost),
            str(t.gained),
            f"{t.mean_steps:.1f}",
            percent(t.converged / puzzles),
            percent(t.right_share),
            style="bold green" if names else None,
        )
    _console().print(table)


def noise_choice(choice: NoiseChoice, breadth: int) -> None:
    """`eqr calibrate --noise-scales`: what each noise answers, and against the trained one."""
    table = Table(title=f"noise, breadth {breadth}", title_justify="left")
    for name in ("", "noise", "selected", "gained", "lost", "p", "first", "single", "any"):
        table.add_column(name, justify="right" if name else "left")
    for t in choice.trials:
        by = t.by_selected
        kinds = [("chosen", choice.chosen), ("trained", choice.trained)]
        table.add_row(
            ", ".join(name for name, scale in kinds if t.noise_scale == scale),
            f"{t.noise_scale:g}",
            percent(t.selected / by.puzzles),
            str(by.gained),
            str(by.lost),
            f"{by.p:.2g}",
            percent(t.first / by.puzzles),
            percent(t.single),
            percent(t.any / by.puzzles),
            style="bold green" if t.noise_scale == choice.chosen else None,
        )
    _console().print(table)


def lines(*texts: str) -> None:
    """Plain lines."""
    console = _console()
    for text in texts:
        console.print(text, markup=False, soft_wrap=True)


def facts(title: str, values: dict[str, str]) -> None:
    """A name and a value on each line."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(value))
    _console().print(table)
