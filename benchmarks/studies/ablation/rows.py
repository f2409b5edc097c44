"""The rows of the table, what each one is made of, and what a training step of it costs."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.workload import operations
from benchmarks.studies.ablation.settings import TrainingSettings
from eqr_kernels import EqRConfig

FORMULA = (
    "operations of a sample's training step = F * (applications without gradient + 3 * applications with gradient), "
    "F = 2 * 3 * S * d * (k(S) + k(d)) for a block that mixes tokens by a SwiGLU: a multiply-add is two operations, "
    "and a backward pass costs two forward ones; embedding, heads, norms, noise and optimizer are left out"
)


@dataclass(frozen=True)
class Row:
    """What a row is.

    Attributes:
        title: of its line in the table.
        about: its definition.
        distinct: a stack: each of its applications has a block of its own; otherwise the module's blocks are reused.
        online: a stack: it is trained in segments from the detached state; otherwise in a single pass.
        operator: fields of the config of a reasoner, which `Trainer` trains; None for a stack.
    """

    title: str
    description: str
    distinct: bool = False
    online: bool = False
    operator: dict[str, Any] | None = None

    @property
    def is_stack(self) -> bool:
        return self.operator is None


_FIXED: dict[str, Any] = {"fixed_init": True, "lambda_": 1.0, "noise_scale": 0.0}
_RANDOM_START: dict[str, Any] = {"fixed_init": False}
_NOISE: dict[str, Any] = {"lambda_": 0.95, "noise_scale": 0.01}

ROWS: dict[str, Row] = {
    "feed-forward": Row(
        "(a) feed-forward",
        "one pass through `layers` distinct blocks, z = blocks(e); the loss at the end, the gradient through all",
        distinct=True,
    ),
    "tied": Row(
        "(b) weight-tied, single pass",
        "z <- blocks(z + e) from z = 0, `layers` applications of the module's blocks in all, so the input stays "
        "available as in the paper; one latent state; the loss at the end, the gradient through all. Deeper at test "
        "time: more passes from the state that the last one left, which it was never trained on",
    ),
    "tied-online": Row(
        "(c) + segmented online training",
        "the network of (b), in segments of as many applications as an outer step of (d) has: every training step is "
        "one segment from the detached state of the last, with its own loss and update, and a row is replaced after "
        "`halt_max_steps` segments; the gradient through the whole segment, no halting (both as in the paper)",
        online=True,
    ),
    "trm": Row(
        "(d) TRM",
        "two latent states at two rates, the gradient through the last latent recursion only, learned halting; a fixed "
        "start, no damping, no noise",
        operator=_FIXED,
    ),
    "trm+ri": Row("(d) + RI", "(d) from random starts", operator={**_FIXED, **_RANDOM_START}),
    "trm+ni": Row("(d) + NI", "(d) with damping 0.05 and noise 0.01", operator={**_FIXED, **_NOISE}),
    "eqr": Row("(e) EqR", "(d) with both", operator={**_FIXED, **_RANDOM_START, **_NOISE}),
}
_OVERRIDES = ("layers", "lr")


@dataclass(frozen=True)
class Choice:
    """A row with what it takes in place of the settings, such as "feed-forward:layers=8,lr=3e-4"."""

    name: str
    overrides: tuple[tuple[str, float], ...] = ()

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def key(self) -> str:
        """As it is written."""
        changes = ",".join(f"{name}={value:g}" for name, value in self.overrides)
        return f"{self.name}:{changes}" if changes else self.name

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.+-]", "-", self.key)

    @property
    def title(self) -> str:
        changes = ", ".join(f"{name} {value:g}" for name, value in self.overrides)
        return f"{self.row.title}, {changes}" if changes else self.row.title

    def settings(self, common: TrainingSettings) -> TrainingSettings:
        """The settings that this row is trained with."""
        changes: dict[str, Any] = {name: int(value) if name == "layers" else value for name, value in self.overrides}
        return dataclasses.replace(common, **changes)


def parse_row(text: str) -> Choice:
    """A row's name, with overrides where it has some.

    Raises:
        ValueError: no such row or override.
    """
    name, _, rest = text.partition(":")
    if name not in ROWS:
        raise ValueError(f"rows: {name!r} is none of {', '.join(ROWS)}")
    overrides = []
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in _OVERRIDES:
            raise ValueError(f"rows: {text!r} may set {' and '.join(_OVERRIDES)}, as in feed-forward:layers=8")
        if key == "layers" and not (ROWS[name].is_stack and not ROWS[name].online):
            raise ValueError(f"rows: {text!r} sets layers, which only feed-forward and tied have")
        try:
            overrides.append((key, float(json.loads(value))))
        except (ValueError, TypeError):
            raise ValueError(f"rows: {text!r}: {value!r} is not a number") from None
    return Choice(name, tuple(overrides))


@dataclass(frozen=True)
class Shape:
    """How often a row's blocks are applied to a sample.

    Attributes:
        blocks: distinct ones.
        applications: in one training step, which is also one step of depth at test time.
        without_gradient: of those.
    """

    blocks: int
    applications: int
    without_gradient: int


def operator_config(row: Row, settings: TrainingSettings) -> EqRConfig:
    """The config of a reasoner, or of the weights of a stack (whose cycles mean nothing)."""
    if not row.is_stack:
        assert row.operator is not None
        return dataclasses.replace(settings.config, **row.operator)
    blocks = settings.layers if row.distinct else settings.config.L_layers
    return dataclasses.replace(settings.config, **_FIXED, L_layers=blocks, H_cycles=1, L_cycles=1)


def shape(row: Row, settings: TrainingSettings) -> Shape:
    """How often the blocks of a row are applied.

    Raises:
        ValueError: the applications of a weight-tied stack are no multiple of its blocks.
    """
    c = settings.config
    if not row.is_stack:
        last = (c.L_cycles + 1) * c.L_layers
        return Shape(c.L_layers, c.layers_per_step, c.layers_per_step - last)
    if row.distinct:
        return Shape(settings.layers, settings.layers, 0)
    applications = c.layers_per_step if row.online else settings.layers
    if applications % c.L_layers:
        raise ValueError(f"layers must be a multiple of L_layers={c.L_layers} for the tied row, got {applications}")
    return Shape(c.L_layers, applications, 0)


def block_operations(config: EqRConfig) -> int:
    """Operations of one application of a block to one sample, F in `FORMULA`."""
    return operations(config).total // config.layers_per_step


def step_operations(row: Row, settings: TrainingSettings) -> int:
    """Operations of a training step of one sample, see `FORMULA`."""
    s = shape(row, settings)
    with_gradient = s.applications - s.without_gradient
    return block_operations(settings.config) * (s.without_gradient + 3 * with_gradient)


def training_steps(row: Row, settings: TrainingSettings) -> int:
    """The training steps that the budget pays for.

    Raises:
        ValueError: it does not pay for one.
    """
    cost = step_operations(row, settings) * settings.batch_size
    steps = int(settings.budget // cost)
    if steps < 1:
        raise ValueError(
            f"a budget of {settings.budget:.3g} operations pays for no step of {row.title}, which takes {cost:.3g}; "
            "give more --petaflop or --minutes, or a smaller --batch"
        )
    return steps
