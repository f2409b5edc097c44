"""The models and inputs that all contenders get, what they cost, and what their output must be."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from eqr_kernels import EqRConfig, EquilibriumReasoner, reference
from eqr_kernels.config import TRM_FIELDS


def _trm() -> EqRConfig:
    """The size of the shipped model as a TRM of one latent recursion: every operation of it carries a gradient."""
    return EqRConfig.sudoku(H_cycles=1, **TRM_FIELDS)


PRESETS = {
    "sudoku-paper": EqRConfig.sudoku_paper,
    "maze": EqRConfig.maze,
    "sudoku-small": EqRConfig.sudoku_small,
    "sudoku-trm": _trm,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_LIMIT = {"fp32": 2e-5, "int8": 0.05}
"""Of the logits after two applications of the module on random weights; bf16 is held to the reference's own error."""
STEP_LIMIT = {"fp32": 1e-3, "bf16": 0.5, "int8": 0.7}
"""After a whole outer step, where random weights amplify rounding: it only tells whether all cycles were run."""


class Unavailable(Exception):
    """This contender cannot run here, and why."""


def cpu_flags() -> set[str]:
    """The CPU's feature flags as the kernel names them; empty where it does not say."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return set()
    return set(match[1].split()) if match else set()


def has_bf16() -> bool:
    """Whether PyTorch's bf16 products run on instructions made for them: a hundred times as slow otherwise."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


@dataclass(frozen=True)
class Operations:
    """Operations (a multiply-add is two) of the matrix products of one outer step of one trajectory, heads left out."""

    mixer: int  # products that stay in bf16 when the precision is int8
    channel: int

    @property
    def total(self) -> int:
        return self.mixer + self.channel


def operations(config: EqRConfig) -> Operations:
    s, d = config.seq_len, config.hidden_size
    channel = 3 * s * d * config.swiglu_size(d)
    if config.mlp_t:
        mixer = 3 * d * s * config.swiglu_size(s)
    else:
        mixer = 2 * s * s * d  # the attention itself, scores and sums
        channel += 4 * s * d * d  # its projections
    return Operations(2 * mixer * config.layers_per_step, 2 * channel * config.layers_per_step)


@dataclass(frozen=True)
class Workload:
    """One preset at one batch size, with random weights and tokens; the same in every process.

    Attributes:
        pretrained: the weights are those of the shipped model of that name.
        device: where the model and the tokens are.
    """

    preset: str
    batch: int
    pretrained: bool = False
    device: str = "cpu"

    @cached_property
    def model(self) -> EquilibriumReasoner:
        if self.pretrained:
            return EquilibriumReasoner.from_pretrained(self.preset).to(self.device)
        torch.manual_seed(0)
        return EquilibriumReasoner(PRESETS[self.preset]()).eval().to(self.device)

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [batch, S]"""
        config = self.model.config
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, config.vocab_size, (self.batch, config.seq_len), generator=generator)
        return tokens.to(self.device)

    @cached_property
    def short(self) -> EquilibriumReasoner:
        """The same weights in an outer step of two applications of the module only, which amplify little."""
        return with_config(self.model, H_cycles=1, L_cycles=1)

    def checked_rows(self) -> Tensor:
        """The first and the last row: what is compared with the reference."""
        return torch.tensor(sorted({0, self.batch - 1}), device=self.device)


def with_config(model: EquilibriumReasoner, **changes: object) -> EquilibriumReasoner:
    """A model of the same weights, in memory of its own, and another config."""
    other = EquilibriumReasoner(dataclasses.replace(model.config, **changes), card=model.card).eval()  # type: ignore
    other.load_state_dict(model.state_dict())
    return other.to(model.device)


@torch.inference_mode()
def expected_logits(model: EquilibriumReasoner, tokens: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [n, S, V] of one outer step of the reference in `dtype` without noise, from the start of seed 0."""
    cast = with_config(model).to(dtype)
    config, weights, state = cast.config, cast.weights(), cast.initial_state(len(tokens), ids=ids)

    def update(z: Tensor, u: Tensor, _: int) -> Tensor:
        return reference.damped_update(z, u, None, config.lambda_, 0.0)

    e = reference.embed(tokens, weights)
    z_H, _ = reference.outer_step(
        state.z_H, state.z_L, e, reference.all_blocks(weights, cast.rope(), config), config, update
    )
    return reference.heads(z_H, weights)[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
