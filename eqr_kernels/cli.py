"""The command line: `eqr solve`, `eval`, `train`, `calibrate`, `curve`, `diagnose`, `generate`, `info`, `bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from eqr_kernels.commands import bench
from eqr_kernels.commands.calibrate import calibrate
from eqr_kernels.commands.console import show_tracebacks
from eqr_kernels.commands.curve import curve
from eqr_kernels.commands.diagnose import diagnose
from eqr_kernels.commands.evaluate import evaluate
from eqr_kernels.commands.generate import generate
from eqr_kernels.commands.info import info
from eqr_kernels.commands.solve import solve
from eqr_kernels.commands.train import train

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
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of `eqr`."""
    app(prog_name="eqr")


if __name__ == "__main__":
    main()
