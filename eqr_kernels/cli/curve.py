"""`eqr curve`."""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from eqr_kernels import selection
from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli import options as opt
from eqr_kernels.cli import puzzles as puz
from eqr_kernels.cli import render
from eqr_kernels.cli.console import INCOMPLETE, Bar, command, complain, parse_numbers
from eqr_kernels.cli.engines import engine_of, rows_shown, task_spec, working
from eqr_kernels.cli.provenance import device_name, reproduction
from eqr_kernels.cli.render import require, terminal
from eqr_kernels.cli.render.curve_terminal import draw_curve
from eqr_kernels.distributed.recordings import fill
from eqr_kernels.solver import DEFAULT_DEPTH, card_in
from eqr_kernels.studies.costs import Price, UnitCosts
from eqr_kernels.studies.curve import CurveMap, Request, group_sizes, usual_tolerances
from eqr_kernels.studies.curve_report import CurveReport, Puzzles
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.store import OtherRecording
from eqr_kernels.studies.subset import SUBSET_SEED
from eqr_kernels.tasks.common import ParseErrors
from eqr_kernels.tasks.task import generated
from eqr_kernels.tolerance import card_tolerance

_GENERATED_SEED = 2026
_QUICK = {"depth": 16, "breadth": 4, "puzzles": 48}
_USUAL = {"depth": DEFAULT_DEPTH, "breadth": 8, "puzzles": 200}
PARTS = "recording"


@command
def curve(
    ctx: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Puzzles with answers, or - for stdin; without, puzzles of our own."),
    ] = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of curve.json, the report and the pictures; and of what was run.")
    ] = Path("curve"),
    depth: Annotated[
        int | None, typer.Option(min=1, help="Outer steps of a trajectory, at most.", show_default=str(DEFAULT_DEPTH))
    ] = None,
    breadth: Annotated[
        int | None, typer.Option(min=1, help="Trajectories of each puzzle at most.", show_default="8")
    ] = None,
    views: Annotated[
        bool,
        typer.Option(
            "--views",
            help="Each trajectory of a puzzle gets a view of its own, by symmetries that the task knows. A race then "
            "takes them one after the other.",
        ),
    ] = False,
    turn_every: opt.TurnEvery = None,
    tols: Annotated[
        str,
        typer.Option(
            help="Tolerances of the residual exit, as in 0.02,0.03; auto takes the card's and some about them."
        ),
    ] = "auto",
    select: Annotated[str, typer.Option(help="Which trajectory answers: residual, vote or q.")] = "residual",
    price: Annotated[
        float | None, typer.Option(help="Price of an hour of this machine, or of the GPU where the model is on one.")
    ] = None,
    currency: Annotated[str, typer.Option(help="Currency of --price.")] = "USD",
    target: Annotated[
        float | None, typer.Option(help="Accuracy wanted, as in 0.95: recommends the cheapest settings.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='The most to spend: "0.02 USD" for 1,000 puzzles (with --price), "5 ms" at the p95 of a query alone, '
            '"100 nfe" or "0.1 s" of a core or GPU a puzzle.'
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Depth 16, breadth 4, 48 puzzles and short timings: a minute or two.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what --out holds of an earlier run.")] = False,
    window: opt.Window = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    precision: opt.Precision = "auto",
    device: opt.Device = "auto",
    limit: opt.Limit = None,
    subset: opt.Subset = None,
    reveal: opt.Reveal = None,
    format: opt.Format = "auto",
    split: opt.Split = None,
    engine: opt.Engine = "local",
    address: opt.Address = None,
    workers: opt.Workers = None,
    cpus_per_worker: opt.CpusPerWorker = None,
    as_json: opt.AsJson = False,
    progress: opt.ShowProgress = None,
) -> int:
    """Map what depth, breadth and early exit cost, what they buy, and where the curve bends.

    All puzzles run once, without halting, to the greatest depth and breadth. As a trajectory depends on its puzzle,
    seed and restart alone, that run holds what every shallower and narrower setting answers, with a fixed depth, with
    residual exit at each of --tols, with q-halt, with the two together, and as races. An outer step is timed on this
    machine, alone and in company; costs are counted steps times that. The points that matter are then run for real, and
    both are reported.

    What was run is kept in OUT/recording as it is done. The same command goes on after an interruption, and another
    --price, --target or --budget does not run the puzzles again. With --engine ray, workers on all machines of a Ray
    cluster run the puzzles; steps are timed, and points run for real, on this one.

    Exit code 0: mapped; 1: mapped, but some lines could not be used, or nothing fits --target and --budget; 2: nothing
    could be done; 130: interrupted, and what was run is kept.
    """
    begun = time.perf_counter()
    runner = engine_of(engine, address, workers, cpus_per_worker)
    sizes = _QUICK if quick else _USUAL
    price_per_hour = None if price is None else Price(price, currency)
    limit_of = _budget(budget, price_per_hour)
    if target is not None and not 0 < target <= 1:
        raise ValueError(f"--target must be a share above 0 and up to 1, as in 0.95, got {target}")
    if select == "first":
        raise ValueError("--select first is that of the races, which are mapped anyway; choose residual, vote or q")
    if select not in selection.RULES:
        raise ValueError(f"--select must be residual, vote or q, got {select!r}")
    _check_folder(out)
    require()  # before the work: the pictures come last
    reasoner = puz.load_model(model, device, progress)
    its_task = puz.task_for(task, reasoner)
    if file is None:
        count = limit or sizes["puzzles"]
        with Bar("generating puzzles", progress) as bar:
            puzzles = generated(
                its_task, reasoner.config.seq_len, count, _GENERATED_SEED, lambda done: bar.update(done, count)
            )
        errors = ParseErrors()
    else:
        reading: dict[str, Any] = dict(format=format, split=split, limit=limit, show=progress)
        puzzles, errors = puz.read_answered(its_task, reasoner.config.seq_len, file, **reading)
    known = card_tolerance(card_in(reasoner, precision), noise_scale=noise_scale)
    if known is not None and known.caveat:
        complain(known.caveat, "warning")
    of = len(puzzles)
    if quick and subset is None and limit is None and of > sizes["puzzles"]:
        subset = sizes["puzzles"]
    puzzles = puz.reveal_clues(its_task, puz.stratified(puzzles, subset), reveal, seed)
    trajectories, make_views = breadth or sizes["breadth"], None
    if views:
        option = f"--views with --breadth {trajectories}"
        make_views = puz.views_for(its_task, reasoner.config.seq_len, trajectories, seed, option)
    request = Request(
        depth=depth or sizes["depth"],
        breadth=trajectories,
        tols=usual_tolerances(reasoner, noise_scale, precision)
        if tols == "auto"
        else parse_numbers("--tols", tols, allowed="auto or "),
        select=select,
        views=make_views,
        turns=puz.turns_for(its_task, turn_every, depth or sizes["depth"], seed),
        quick=quick,
        seed=seed,
        options=dict(window=window, noise_scale=noise_scale, slots=slots, backend=backend, precision=precision),
        price=price_per_hour,
        target=target,
        budget=limit_of,
        budget_text=budget,
    )
    out.mkdir(parents=True, exist_ok=True)
    try:
        mapping = CurveMap(reasoner, puzzles, weights_digest(reasoner), request, out / PARTS, fresh)
    except OtherRecording as error:
        raise ValueError(f"{error} (--fresh starts afresh, --out names another folder)") from None
    try:
        if engine != "local":
            with working("running all puzzles", progress) as bar:
                fill(runner, mapping, task_spec(task, its_task), rows_shown(bar))
        measured = mapping.run(lambda text: Bar(text, progress))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {mapping.store.puzzles()} of {len(puzzles)} puzzles are kept in {out / PARTS}, and the same "
            "command goes on from there"
        ) from None
    costs: UnitCosts = measured["unit_costs"]
    report = CurveReport(
        model=model,
        task=its_task.name,
        puzzles=Puzzles(
            count=len(puzzles),
            of=of,
            file=file,
            groups=group_sizes(puzzles),
            subset_seed=SUBSET_SEED if len(puzzles) < of else None,
            reveal=reveal,
        ),
        device=f"{device_name(reasoner.device)}, {costs.units} {costs.unit}{'s' if costs.units > 1 else ''}",
        reproduce=reproduction(ctx, reasoner, puzzles),
        errors=tuple(puz.errors_as_json(errors)),
        seconds=time.perf_counter() - begun,
        **measured,
    )
    text = report.to_json()
    atomic_write(out / "curve.json", text.encode())
    files = [out / "curve.json", *render.write_report(report, out)]
    if as_json:
        sys.stdout.write(text)
    else:
        draw_curve(report)
        terminal.lines(f"written: {', '.join(map(str, files))}")
    recommended = report.recommendation
    nothing_fits = recommended is not None and recommended.index is None
    if recommended is not None and nothing_fits:
        complain(recommended.reason)
    return INCOMPLETE if errors or nothing_fits else 0


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")


def _budget(text: str | None, price: Price | None) -> tuple[float, str] | None:
    """The amount and what it is of, checked before the work begins."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([^\s0-9].*?)\s*", text)
    units = ["nfe", "ms", "s", *([price.currency] if price else [])]
    try:
        value, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    except ValueError:
        value, unit = math.nan, ""
    if not 0 < value < math.inf or unit not in units:
        known = ", ".join(f'"{amount} {u}"' for amount, u in zip(("100", "5", "0.1", "0.02"), units, strict=False))
        raise ValueError(
            f"--budget must be a positive amount and its unit, as in {known}, got {text!r}"
            + ("" if price else "; money needs --price")
        )
    return value, unit
