"""A model as the compiled ops take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from eqr_kernels import ops
from eqr_kernels.config import PUBLISHED_MULTIPLE, EqRConfig, next_multiple
from eqr_kernels.modules import EqROperator
from eqr_kernels.precision import Precision
from eqr_kernels.reference import BlockWeights, OperatorWeights, Rope


def wrong_dtype(model: EqROperator) -> str | None:
    """Which weight cannot be packed, with the remedy; None where all can."""
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return (
                f"weight {name} is {weight.dtype}, and the kernel takes float32 and bfloat16; use model.float() or "
                "backend='reference'"
            )
    return None


def operator_of(model: EqROperator) -> ops.Operator:
    """A model's operator without its weights, with the hidden units that the kernels take: see `hidden_units`."""
    c = model.config
    rotated = not c.mlp_t and c.pos_encodings != "none"
    rope_parts = 0 if not rotated else 2 if c.pos_encodings == "rope2d" else 1
    mixer_hidden, heads = (hidden_units(c, c.seq_len), 0) if c.mlp_t else (0, c.num_heads)
    sizes = (
        c.seq_len,
        c.hidden_size,
        c.vocab_size,
        mixer_hidden,
        hidden_units(c, c.hidden_size),
        heads,
        c.L_layers,
        c.H_cycles,
        c.L_cycles,
        rope_parts,
    )
    constants = (c.lambda_, c.rms_norm_eps, c.H_init_std, c.L_init_std)
    return ops.Operator(sizes, constants, model.H_init is not None)


def hidden_units(config: EqRConfig, size: int) -> int:
    """Of a SwiGLU on an axis of `size`, with those of weight 0 that the kernels want besides: they add nothing."""
    return next_multiple(config.swiglu_size(size), PUBLISHED_MULTIPLE)


def _with_padding(gate_up: Tensor, down: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """gate_up [2k, m], gates first, and down [m, k] with `hidden` units."""
    missing = hidden - down.shape[1]
    if not missing:
        return gate_up, down
    gate, up = (pad(half, (0, 0, 0, missing)) for half in gate_up.chunk(2))
    return torch.cat([gate, up]), pad(down, (0, missing))


class PackArguments(NamedTuple):
    """What is packed of a model, in its own dtype: the arguments of `ops.pack_weights`."""

    weights: OperatorWeights
    operator: ops.Operator
    rope: Rope | None
    start: tuple[Tensor, Tensor] | None  # H_start, L_start [d]

    @classmethod
    def of(cls, model: EqROperator) -> PackArguments:
        w, rope, start = model.weights(), model.rope(), None
        if model.H_init is not None and model.L_init is not None:
            start = _plain(model.H_init), _plain(model.L_init)
        blocks = tuple(padded_block(BlockWeights(*map(_plain, block)), model.config) for block in w.blocks)
        weights = OperatorWeights(_plain(w.embedding), _plain(w.lm_head), _plain(w.q_weight), _plain(w.q_bias), blocks)
        return cls(weights, operator_of(model), None if rope is None else Rope(*map(_plain, rope)), start)

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the op's schema."""
        *heads, layers = self.weights
        return [*heads, *(tensor for block in layers for tensor in block), *(self.rope or ()), *(self.start or ())]

    def fingerprint(self) -> tuple[object, ...]:
        present = self.tensors()
        return ops.fingerprint(present), len(present), self.operator

    def pack(self, precision: Precision, layout: str = "") -> ops.PackedWeights:
        rope = None if self.rope is None else Rope(*(table.float() for table in self.rope))
        start = None if self.start is None else (self.start[0].float(), self.start[1].float())
        weights = self.weights.to(torch.float32)
        return ops.pack_weights(weights, self.operator, precision, rope=rope, start=start, layout=layout)


def padded_block(block: BlockWeights, c: EqRConfig) -> BlockWeights:
    """The block with the hidden units that the kernels take, see `hidden_units`; differentiable."""
    mixer = block.mixer_in, block.mixer_out
    if c.mlp_t:
        mixer = _with_padding(*mixer, hidden_units(c, c.seq_len))
    return BlockWeights(*mixer, *_with_padding(block.gate_up, block.down, hidden_units(c, c.hidden_size)))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()
