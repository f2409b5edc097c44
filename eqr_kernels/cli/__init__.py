"""The command line: `eqr solve`, `eval`, `train`, `calibrate`, `curve`, `diagnose`, `generate`, `info`."""

from __future__ import annotations

from typing import Annotated

import typer

from eqr_kernels.cli.calibrate import calibrate
from eqr_kernels.cli.console import show_tracebacks
from eqr_kernels.cli.curve import curve
from eqr_kernels.cli.diagnose import diagnose
from eqr_kernels.cli.evaluate import evaluate
from eqr_kernels.cli.generate import generate
from eqr_kernels.cli.info import info
from eqr_kernels.cli.solve import solve
from eqr_kernels.cli.train import train

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _version(wanted: bool) -> None:
    if wanted:
        import eqr_kernels

        typer.echo(f"eqr_kernels {eqr_kernels.__version__}")
        raise typer.Exit


@app.callback()
def eqr(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Equilibrium Reasoners: puzzles solved by iterating a small network until its latent state settles."""
    show_tracebacks(traceback)


app.command("solve")(solve)
app.command("eval")(evaluate)
app.command("diagnose")(diagnose)
app.command("train")(train)
app.command("calibrate")(calibrate)
app.command("curve")(curve)
app.command("generate")(generate)
app.command("info")(info)


def main() -> None:
    """Entry point of `eqr`."""
    app(prog_name="eqr")
