"""Running `eqr` in this process, and a model for it that copies."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from eqr_kernels import EqRConfig
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.cli import app
from tests.support.models import copier

TINY = dict(hidden_size=16, num_heads=2, H_cycles=1, L_cycles=1, L_layers=1)


def eqr(*arguments: object, input: str | None = None, code: int = 0):
    """Runs the command and checks its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
    return result


def eqr_json(*arguments: object, input: str | None = None, code: int = 0):
    """What the command prints with --json."""
    return json.loads(eqr(*arguments, "--json", input=input, code=code).stdout)


def make_copier(path: Path, config: EqRConfig, **card: object) -> Path:
    """A `copier` with a card, in a folder."""
    model = copier(config)
    model.card = ModelCard(config, **card)
    model.save_pretrained(path)
    return path
