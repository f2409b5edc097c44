"""What a report needs so that its numbers can be had again: the command, the weights, the data and the machine."""

from __future__ import annotations

import shlex
from typing import Any

import torch
import typer

from eqr_kernels.cli.info import cpu_name, versions
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.identity import weights_digest
from eqr_kernels.studies.subset import digest
from eqr_kernels.tasks.common import PuzzleSet


def reproduction(ctx: typer.Context, model: EquilibriumReasoner, puzzles: PuzzleSet) -> dict[str, Any]:
    """The part of a report that says how to get it again.

    The data's digest is that of the puzzles and answers that were run, after --limit, --subset and --reveal.
    """
    assert puzzles.labels is not None
    card = model.card
    return {
        "command": command_line(ctx),
        "weights_sha256": weights_digest(model),
        "model_file_sha256": card.sha256 or None if card else None,
        "data_sha256": digest(puzzles.inputs, puzzles.labels),
        "device": str(model.device),
        "device_name": device_name(model.device),
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
    }


def command_line(ctx: typer.Context) -> str:
    """The command as it could be typed again: what was given, and nothing that was left at its default."""
    words, arguments = [ctx.command_path], []
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        source = ctx.get_parameter_source(option.name or "")
        if value is None or source is None or source.name.startswith("DEFAULT"):
            continue
        if option.param_type_name == "argument":
            arguments.append(shlex.quote(str(value)))
        elif isinstance(value, bool):
            words.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            words += [option.opts[0], shlex.quote(str(value))]
    return " ".join([*words, *arguments])


def device_name(device: torch.device) -> str:
    """The CPU's or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
