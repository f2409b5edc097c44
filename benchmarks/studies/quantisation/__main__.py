"""`python -m benchmarks.studies.quantisation FILE`: which precisions keep the attractors; see docs/quantisation.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from eqr_kernels.cli import options as opt
from eqr_kernels.cli.console import INCOMPLETE, Bar, command, complain, emit
from eqr_kernels.solver import DEFAULT_DEPTH

_SIMULATE_IN = "fp32"


@command
def main(
    ctx: typer.Context,
    file: opt.AnsweredFile = None,
    model: opt.Model = opt.MODEL,
    task: opt.TaskName = None,
    depth: opt.Depth = DEFAULT_DEPTH,
    breadth: opt.Breadth = 8,
    tol: Annotated[
        str, typer.Option(help="Residual that counts as settled; auto takes the card's of each precision.")
    ] = "auto",
    subset: opt.Subset = None,
    reveal: opt.Reveal = None,
    limit: opt.Limit = None,
    noise_scale: opt.NoiseScale = None,
    seed: opt.Seed = 0,
    slots: opt.Slots = None,
    backend: opt.BackendName = "auto",
    device: opt.Device = "auto",
    simulate_in: Annotated[str, typer.Option(help="Kernel of the simulated variants: fp32 or bf16.")] = _SIMULATE_IN,
    only: Annotated[str | None, typer.Option(help="Names of variants, as in bf16,int8.")] = None,
    displaced: Annotated[int, typer.Option(min=0, help="Puzzles for displacement and straying; 0: none.")] = 32,
    rounds: Annotated[int, typer.Option(min=0, help="Of the timing; 0: none.")] = 7,
    max_loss: Annotated[float, typer.Option(help="Share of accuracy that the recommendation may lose.")] = 0.01,
    max_attractors_lost: Annotated[float, typer.Option(help="Share of attractors that may be lost.")] = 0.01,
    results: Annotated[
        Path | None, typer.Option(help="Folder of <device>/quantisation.json; without, nothing is written.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the JSON file in it, without its ending.")] = "quantisation",
    table: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Print the tables of docs/quantisation.md, and do no more.")
    ] = None,
    as_json: opt.AsJson = False,
    progress: opt.ShowProgress = None,
) -> int:
    """Run every precision on the same puzzles, starts and noise as fp32, and say what it does to the attractors."""
    from benchmarks import machine
    from benchmarks.studies.quantisation import drawing as drawing_quantisation
    from benchmarks.studies.quantisation.study import study
    from benchmarks.studies.quantisation.variants import default_variants
    from eqr_kernels.cli import puzzles as puz
    from eqr_kernels.cli.provenance import reproduction
    from eqr_kernels.studies.subset import SUBSET_SEED

    if table is not None:
        known = json.loads(table.read_text())["quantisation"]
        if "max_attractors_lost" not in known["rule"]:
            complain(f"{table} is older than the present rule; its verdicts are not by right answers alone", "warning")
        print(drawing_quantisation.markdown(known))
        return 0
    chosen = _chosen(default_variants(simulate_in), only)
    reasoner = puz.load_model(model, device, progress)
    tols = _tolerances(tol, reasoner, {"fp32", *(variant.precision for variant in chosen)})
    its_task = puz.task_for(task, reasoner)
    puzzles, errors = puz.read_answered(its_task, reasoner.config.seq_len, file, limit=limit, show=progress)
    of = len(puzzles)
    puzzles = puz.reveal_clues(its_task, puz.stratified(puzzles, subset), reveal, seed)
    assert puzzles.labels is not None
    path = None if results is None else results / machine.folder() / f"{name}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Not before the puzzles are read: what others took of the machine while this ran counts for the times only.
    busy = machine.busy()
    with Bar("quantising", progress) as bar:
        result = study(
            reasoner,
            puzzles.inputs,
            puzzles.labels,
            depth=depth,
            breadth=breadth,
            tol=tols,
            seed=seed,
            progress=bar.update,
            variants=chosen,
            noise_scale=noise_scale,
            backend=backend,
            slots=slots,
            displaced=displaced,
            rounds=rounds,
            max_loss=max_loss,
            max_attractors_lost=max_attractors_lost,
        )
    report: dict[str, Any] = {
        "benchmark": "quantisation",
        "model": model,
        "reveal": reveal,
        "subset": None if subset is None else {"puzzles": subset, "of": of, "seed": SUBSET_SEED},
        "simulate_in": simulate_in,
        "quantisation": result,
        "machine": machine.information(),
        "busy_before": busy,
        "reproduce": reproduction(ctx, reasoner, puzzles),
        "errors": puz.errors_as_json(errors),
    }
    emit(report, as_json, path)
    if not as_json:
        drawing_quantisation.draw(result)
        if path is not None:
            print(path)
    return INCOMPLETE if errors else 0


def _chosen(variants: tuple[Any, ...], only: str | None) -> list[Any]:
    if only is None:
        return list(variants)
    names = [part.strip() for part in only.split(",") if part.strip()]
    known = {variant.name: variant for variant in variants}
    for name in names:
        if name not in known:
            raise ValueError(f"--only must name variants separated by commas, of {', '.join(known)}, got {name!r}")
    return [known[name] for name in dict.fromkeys(names)]


def _tolerances(text: str, model: Any, precisions: set[str]) -> dict[str, float]:
    """Of each precision, as `solve` takes it, but for a model that has none: what is no promise there would be none
    here."""
    from eqr_kernels.cli.tolerance import parse_tolerance
    from eqr_kernels.solver import card_in
    from eqr_kernels.tolerance import card_tolerance

    tol = parse_tolerance(text)
    if not isinstance(tol, str):
        return dict.fromkeys(precisions, tol)
    tols = {}
    for name in sorted(precisions):
        known = card_tolerance(card_in(model, name), tol)
        if known is None:
            raise ValueError(
                f"--tol {tol} needs a calibrated tolerance, and this model's card has none for {name}; "
                f"`eqr calibrate --precision {name} --write` finds one"
            )
        tols[name] = known.value
    return tols


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks.studies.quantisation")
