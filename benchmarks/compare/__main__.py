"""`python -m benchmarks.compare BEFORE AFTER`: what got slower or faster."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.compare import Comparison, Item, NotResults, Settings, pairs, read
from benchmarks.compare import compare as compare_runs
from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import INCOMPLETE, check_output, command, complain, emit

MOST_NAMED = 10
app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@command
def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Results: a file, or a folder of them.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Likewise; files in folders are matched by name.")],
    threshold: Annotated[float, typer.Option(help="The least change that counts, in percent.")] = 5.0,
    false_alarms: Annotated[
        float, typer.Option(help="How often two runs of the same code may show any change, in percent.")
    ] = 5.0,
    between_runs: Annotated[
        float,
        typer.Option(help="Standard deviation from run to run that the rounds of neither show, in percent."),
    ] = 1.0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare absolute times of different machines and versions too.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show also the rows that stayed the same.")] = False,
    as_json: opt.AsJson = False,
    output: opt.Output = None,
) -> int:
    """Say what got slower or faster from one run to another: results of `make bench`, or curve.json of `eqr curve`.

    A row counts when it changed by more than --threshold, and by more than the noise of the two runs: that many
    standard errors of the difference of the logarithms of the medians as keep false alarms at --false-alarms over all
    rows together. The standard error comes from the range of the rounds (20 to 80 %, or the quartiles of
    pytest-benchmark), no quieter than the median row, and from --between-runs.

    Shares of a peak measured in the same run are compared first, then ratios to peers, for a slow phase of the machine
    cancels in them; absolute times only where a row has neither, and only of the same device, threads, instruction set
    and versions. Bytes and outer steps are compared as they are. Rows of the peers are shown, and do not count.

    Exit code 0: nothing got slower; 1: something did; 2: nothing could be compared.
    """
    check_output(output)
    settings = Settings(threshold / 100, false_alarms / 100, between_runs / 100, force)
    matched, only_before, only_after = pairs(before, after)
    runs, skipped = [], []
    for left, right in matched:
        try:
            runs.append((read(left), read(right)))
        except NotResults as reason:
            if len(matched) == 1:
                raise
            skipped.append(str(reason))
    result = compare_runs(
        runs, settings, only_before=tuple(only_before), only_after=tuple(only_after), skipped=tuple(skipped)
    )
    emit(_report(before, after, result), as_json, output)
    if not as_json:
        _draw(result, every)
    if not result.judged:
        complain(f"nothing in {before} and {after} can be compared{_why(result)}")
        return 2
    return INCOMPLETE if result.counted("slower") else 0


app.command()(compare)


def _why(result: Comparison) -> str:
    reasons = dict.fromkeys(item.reason for item in result.items if item.reason)
    return f": {'; '.join(reasons)}" if reasons else ": no row is in both"


def _report(before: Path, after: Path, result: Comparison) -> dict[str, Any]:
    return {
        "command": "compare",
        "before": str(before),
        "after": str(after),
        "settings": dataclasses.asdict(result.settings),
        "standard_errors_needed": result.limit,
        "differences": [{"name": n, "before": a, "after": b} for n, a, b in result.differences],
        "absolute_times_compared": result.absolute,
        "judged": result.judged,
        "slower": len(result.counted("slower")),
        "faster": len(result.counted("faster")),
        "rows": [dataclasses.asdict(item) for item in result.items],
        "only_before": list(result.only_before),
        "only_after": list(result.only_after),
        "skipped": list(result.skipped),
        "notes": list(result.notes),
    }


def change_of(item: Item) -> str:
    """Such as "15.0 % slower", from the factor of the costs."""
    words = ("more", "less") if item.kind == "amount" else ("slower", "faster")
    if item.factor >= 1:
        return f"{100 * (item.factor - 1):.1f} % {words[0]}"
    gain = 1 / item.factor - 1 if item.kind != "amount" else 1 - item.factor
    return f"{100 * gain:.1f} % {words[1]}"


def _draw(result: Comparison, every: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for name, a, b in result.differences:
        console.print(f"{name}: {a} before, {b} after", markup=False)
    if not result.absolute:
        console.print("Absolute times are not compared (--force does).", markup=False)
    shown = [item for item in result.items if every or item.verdict in ("slower", "faster", "within noise")]
    shown.sort(key=lambda item: (item.peer, -abs(item.factor - 1)))
    table = Table("row", "measure", title="What changed" if not every else "All rows")
    for name in ("before", "after", "change", "noise", "verdict"):
        table.add_column(name, justify="right")
    for item in shown:
        noise = "" if item.error is None else f"±{100 * result.limit * item.error:.1f} %"
        verdict = item.verdict + (", a peer" if item.peer else "") + (f": {item.reason}" if item.reason else "")
        colour = {"slower": "red", "faster": "green"}.get(item.verdict, "") if not item.peer else "dim"
        cells = (item.row, item.measure, f"{item.before:.4g}", f"{item.after:.4g}", change_of(item), noise, verdict)
        table.add_row(*(escape(cell) for cell in cells), style=colour)
    if shown:
        console.print(table)
    for title, names in (("only before", result.only_before), ("only after", result.only_after)):
        for name in names[:MOST_NAMED]:
            console.print(f"{title}: {name}", markup=False)
        if len(names) > MOST_NAMED:
            console.print(f"{title}: {len(names) - MOST_NAMED} more, which --json lists", markup=False)
    for text in (*(f"left out: {reason}" for reason in result.skipped), *result.notes):
        console.print(text, markup=False)
    slower, faster = (len(result.counted(verdict)) for verdict in ("slower", "faster"))
    console.print(
        f"{slower} slower, {faster} faster, of {result.judged} measures compared (a change above "
        f"{100 * result.settings.threshold:.3g} % and {result.limit:.1f} standard errors).",
        markup=False,
    )


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.compare")
