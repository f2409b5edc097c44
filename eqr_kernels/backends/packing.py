"""What the compiled backends share: a model as the ops take it, and what the ops give as a recorder takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.backends.base import FixedPointProblem, Recorder
from eqr_kernels.config import swiglu_size
from eqr_kernels.trajectory import Snapshot

if TYPE_CHECKING:
    from eqr_kernels.modules import EqROperator


PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


def wrong_dtype(model: EqROperator) -> str | None:
    """Which weight cannot be packed, with the remedy; None where all can."""
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return (
                f"weight {name} is {weight.dtype}, and the kernel takes float32 and bfloat16; use model.float() or "
                "backend='reference'"
            )
    return None


def operator_of(model: EqROperator) -> dict[str, Any]:
    """The arguments of the ops that tell of an operator without its weights: sizes, constants and fixed_start."""
    c = model.config
    rotated = not c.mlp_t and c.pos_encodings != "none"
    rope_parts = 0 if not rotated else 2 if c.pos_encodings == "rope2d" else 1
    mixer_hidden, heads = (swiglu_size(c.seq_len, c.expansion), 0) if c.mlp_t else (0, c.num_heads)
    sizes = (
        c.seq_len,
        c.hidden_size,
        c.vocab_size,
        mixer_hidden,
        swiglu_size(c.hidden_size, c.expansion),
        heads,
        c.L_layers,
        c.H_cycles,
        c.L_cycles,
        rope_parts,
    )
    constants = (c.lambda_, c.rms_norm_eps, c.H_init_std, c.L_init_std)
    return dict(sizes=sizes, constants=constants, fixed_start=model.H_init is not None)


class PackArguments(NamedTuple):
    """What is packed of a model, in its own dtype: the arguments of `ops.pack_weights`, in that order."""

    heads: tuple[Tensor, ...]  # embedding, lm_head, q_weight, q_bias
    blocks: tuple[Tensor, ...]
    tables: tuple[Tensor | None, ...]  # rope_cos, rope_sin, H_start, L_start
    sizes: tuple[int, ...]
    constants: tuple[float, ...]

    @classmethod
    def of(cls, model: EqROperator) -> PackArguments:
        w, rope, about = model.weights(), model.rope(), operator_of(model)
        heads = (w.embedding, w.lm_head, w.q_weight, w.q_bias)
        blocks = [tensor for block in w.blocks for tensor in block]
        tables = (*((None, None) if rope is None else rope), model.H_init, model.L_init)
        return cls(
            tuple(tensor.detach().contiguous() for tensor in heads),
            tuple(tensor.detach().contiguous() for tensor in blocks),
            tuple(None if tensor is None else tensor.detach().contiguous() for tensor in tables),
            about["sizes"],
            about["constants"],
        )

    def fingerprint(self) -> tuple[object, ...]:
        present = [tensor for tensor in (*self.heads, *self.blocks, *self.tables) if tensor is not None]
        return ops.fingerprint(present), len(present), self.sizes, self.constants

    def pack(self, precision: str, layout: str = "") -> Tensor:
        embedding, lm_head, q_weight, q_bias = (tensor.float() for tensor in self.heads)
        blocks = [tensor.float() for tensor in self.blocks]
        cos, sin, H_start, L_start = (None if tensor is None else tensor.float() for tensor in self.tables)
        return ops.pack_weights(
            embedding,
            lm_head,
            q_weight,
            q_bias,
            blocks,
            cos,
            sin,
            H_start,
            L_start,
            self.sizes,
            self.constants,
            precision,
            layout,
        )


def hand_over(result: ops.FixedPointOutput, problem: FixedPointProblem, recorder: Recorder) -> None:
    """All trajectories of a run to the recorder, at their ends and at the checkpoints."""
    number = torch.arange(problem.trajectories, device=result.steps.device)
    for i, depth in enumerate(problem.checkpoints):
        at = (field[i] for field in result[8:14])
        recorder.checkpoint(depth, _snapshot(number, *at))
    if problem.trace:
        steps = torch.arange(problem.depth, device=number.device)
        recorder.residual(number[:, None], steps, result.residuals)
    recorder.finished(_snapshot(number, *result[2:8]))
    recorder.winners(result.winner, result.logits)


def _snapshot(
    number: Tensor, preds: Tensor, q_halt: Tensor, residual: Tensor, score: Tensor, steps: Tensor, status: Tensor
) -> Snapshot:
    return Snapshot(number, preds, None, q_halt, residual, score, steps, status)
