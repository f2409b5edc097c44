"""The CPU backend: every outer step of every trajectory in one call of the compiled op `fixed_point`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.backends.base import FixedPointProblem, Proceed, Recorder, Snapshot
from eqr_kernels.config import swiglu_size

if TYPE_CHECKING:
    from eqr_kernels.modules import EquilibriumReasoner

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}
_WEIGHTS = (torch.float32, torch.bfloat16)


class _Weights(NamedTuple):
    """What is packed of a model, in its own dtype: the arguments of `ops.pack_weights`, in that order."""

    heads: tuple[Tensor, ...]  # embedding, lm_head, q_weight, q_bias
    blocks: tuple[Tensor, ...]
    tables: tuple[Tensor | None, ...]  # rope_cos, rope_sin, H_start, L_start
    sizes: tuple[int, ...]
    constants: tuple[float, ...]

    @classmethod
    def of(cls, model: EquilibriumReasoner) -> _Weights:
        c, w, rope = model.config, model.weights(), model.rope()
        heads = (w.embedding, w.lm_head, w.q_weight, w.q_bias)
        blocks = [tensor for block in w.blocks for tensor in block]
        tables = (*((None, None) if rope is None else rope), model.H_init, model.L_init)
        rope_parts = 0 if rope is None else 2 if c.pos_encodings == "rope2d" else 1
        mixer_hidden, heads_count = (swiglu_size(c.seq_len, c.expansion), 0) if c.mlp_t else (0, c.num_heads)
        sizes = (
            c.seq_len, c.hidden_size, c.vocab_size, mixer_hidden, swiglu_size(c.hidden_size, c.expansion), heads_count,
            c.L_layers, c.H_cycles, c.L_cycles, rope_parts,
        )  # fmt: skip
        return cls(
            tuple(tensor.detach().contiguous() for tensor in heads),
            tuple(tensor.detach().contiguous() for tensor in blocks),
            tuple(None if tensor is None else tensor.detach().contiguous() for tensor in tables),
            sizes,
            (c.lambda_, c.rms_norm_eps, c.H_init_std, c.L_init_std),
        )

    def fingerprint(self) -> tuple[object, ...]:
        present = [tensor for tensor in (*self.heads, *self.blocks, *self.tables) if tensor is not None]
        return ops.fingerprint(present), len(present), self.sizes, self.constants

    def pack(self, precision: str) -> Tensor:
        embedding, lm_head, q_weight, q_bias = (tensor.float() for tensor in self.heads)
        blocks = [tensor.float() for tensor in self.blocks]
        cos, sin, H_start, L_start = (None if tensor is None else tensor.float() for tensor in self.tables)
        return ops.pack_weights(
            embedding, lm_head, q_weight, q_bias, blocks, cos, sin, H_start, L_start, self.sizes, self.constants,
            precision,
        )  # fmt: skip


class _Packs:
    """The packed weights of one model: one for each instruction set and precision, good as long as nothing changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packs: dict[tuple[str, str], tuple[tuple[object, ...], Tensor]] = {}

    def get(self, model: EquilibriumReasoner, precision: str) -> Tensor:
        # Read whole at every solve: `p.data.copy_` and the like leave no trace but the bytes.
        weights = _Weights.of(model)
        fingerprint = weights.fingerprint()
        with self._lock:
            isa = ops.cpu_isa()
            key = (isa, precision)
            known = self._packs.get(key)
            if known is not None and known[0] == fingerprint:
                return known[1]
            self._packs.pop(key, None)  # freed before the new one takes its memory
            known = None
            # An inference tensor would be of no use to a later caller outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                packed = weights.pack(precision)
            # Kept only if no other thread changed the weights or the instruction set meanwhile.
            if weights.fingerprint() == fingerprint and ops.cpu_isa() == isa:
                self._packs[key] = (fingerprint, packed)
            return packed


@torch.no_grad()
def latent_recursions(
    model: EquilibriumReasoner, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """`ops.latent_recursions` in float32 with the model's weights as they are now, packed for this one call."""
    packed = _Weights.of(model).pack("fp32")
    z_H, z_L = z_H.contiguous(), z_L.contiguous()
    return ops.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale=model.config.noise_scale, count=count)


class CpuBackend:
    """The fused fixed-point kernel, on torch's threads."""

    name = "cpu"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packs: WeakKeyDictionary[EquilibriumReasoner, _Packs] = WeakKeyDictionary()

    def why_not(self, model: EquilibriumReasoner, dtype: torch.dtype) -> str | None:
        built, reason = ops.extension_status()
        if not built:
            return reason
        weights = model.state_dict(keep_vars=True).items()
        for name, weight in weights:
            if weight.device.type != "cpu":
                return f"weight {name} is on {weight.device}; move the model with model.cpu()"
        for name, weight in weights:
            if weight.dtype not in _WEIGHTS:
                return (
                    f"weight {name} is {weight.dtype}, and the kernel takes float32 and bfloat16; use model.float() or "
                    "backend='reference'"
                )
        if dtype not in _PRECISIONS:
            known = ", ".join(_PRECISIONS.values())
            return f"the kernel computes in {known}, not in {dtype}; choose another precision or backend='reference'"
        return None

    def describe(self, model: EquilibriumReasoner, dtype: torch.dtype) -> str:
        isa, precision, threads = ops.cpu_isa(), _PRECISIONS[dtype], torch.get_num_threads()
        told = f"fused fixed-point kernel, {isa} {precision}, {threads} {'thread' if threads == 1 else 'threads'}"
        native = isa == "avx512_bf16" and ops.build_info()["avx512"] == "native"
        if precision != "fp32" and not native:
            integers = "int8 products in 16-bit instructions, " if precision == "int8" else ""
            told += f" ({integers}bf16 operands in fp32 arithmetic: {isa} has no bf16 instructions here)"
        return told

    def packed(self, model: EquilibriumReasoner, dtype: torch.dtype) -> Tensor:
        """The model's weights as `ops.fixed_point` takes them: uint8 [bytes], packed anew where they have changed."""
        with self._lock:
            packs = self._packs.setdefault(model, _Packs())
        return packs.get(model, _PRECISIONS[dtype])

    @torch.no_grad()
    def fixed_point(
        self, model: EquilibriumReasoner, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed
    ) -> None:
        p, control = problem, torch.zeros(3, dtype=torch.int64)
        packed = self.packed(model, p.dtype)

        def ask() -> bool:
            _, finished, spent = control.tolist()
            return proceed(finished, spent)

        if not ask():
            control[0] = 1
        result = ops.fixed_point(
            packed, p.tokens.contiguous(), p.ids.contiguous(), control, vocabulary=model.config.vocab_size,
            seed=p.seed, breadth=p.breadth, depth=p.depth, halt=p.halt, tol=p.tol, patience=p.patience,
            select=p.select, window=p.window, noise_scale=p.noise_scale, checkpoints=p.checkpoints, slots=p.slots,
            trace=p.trace, ask=ask,
        )  # fmt: skip
        number = torch.arange(p.trajectories)
        for i, depth in enumerate(p.checkpoints):
            at = (field[i] for field in result[8:14])
            recorder.checkpoint(depth, _snapshot(number, *at))
        if p.trace:
            recorder.residual(number[:, None], torch.arange(p.depth), result.residuals)
        recorder.finished(_snapshot(number, *result[2:8]))
        recorder.winners(result.winner, result.logits)
        ask()


def _snapshot(
    number: Tensor, preds: Tensor, q_halt: Tensor, residual: Tensor, score: Tensor, steps: Tensor, status: Tensor
) -> Snapshot:
    return Snapshot(number, preds, None, q_halt, residual, score, steps, status)
