"""The command line: a table of commands, each imported when it is run or its own help is shown.

So `eqr --help` costs no import of torch, and every command's file imports what it needs at its top.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import eqr_kernels
from eqr_kernels.cli.console import busy, errors_explained, show_tracebacks

COMMANDS: dict[str, tuple[str, str]] = {
    "solve": ("solve", "Solve puzzles, each until its own latent state has settled."),
    "eval": (
        "evaluate",
        "Measure exact accuracy by depth and breadth, all from one run of the greatest depth and breadth.",
    ),
    "diagnose": (
        "diagnose",
        "Tell why more depth or breadth does not help, or that it does, from one run without halting.",
    ),
    "train": ("train", "Train a model, resumably to the same result; Ctrl-C saves and stops."),
    "calibrate": (
        "calibrate",
        "Find two residual tolerances: tol, at which converged is a promise, and tol_fast, which costs no accuracy.",
    ),
    "curve": ("curve", "Map what depth, breadth and early exit cost, what they buy, and where the curve bends."),
    "serve": ("serve", "Solve puzzles over HTTP, with a page that shows one settle."),
    "generate": ("generate", "Make puzzles that have exactly one solution."),
    "info": (
        "info",
        "Tell versions, the compiled extension, the machine, backends and why one is unavailable, and shipped models.",
    ),
}
"""Name on the command line: (module of `eqr_kernels.cli`, and the function of the same name in it; line of help)."""


class LazyGroup(TyperGroup):
    """Shows its commands from the table, and imports the one that is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, arguments = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), arguments


def load_command(name: str) -> Any:
    """The command of that name, with its options, as typer's group runs it."""
    module = COMMANDS[name][0]
    with errors_explained(), busy(f"loading eqr {name}"):
        function = getattr(import_module(f"eqr_kernels.cli.{module}"), module)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name)(function)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eqr_kernels {eqr_kernels.__version__}")
        raise typer.Exit


@app.callback()
def eqr(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Equilibrium Reasoners: puzzles solved by iterating a small network until its latent state settles."""
    show_tracebacks(traceback)


def _placeholder() -> None:
    """Stands for a command in the group's own help; `LazyGroup` runs the real one."""


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_placeholder)


def main() -> None:
    """Entry point of `eqr`."""
    app(prog_name="eqr")
