"""One outer step as research code writes it: a line of PyTorch for each line of the operator, noise by `randn_like`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqr_kernels import EquilibriumReasoner, reference
from eqr_kernels.config import EqRConfig
from eqr_kernels.reference import BlockWeights

Module = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z [n, S, d], injection [n, S, d], noise scale, a scalar) -> the next z [n, S, d]."""


class Core(nn.Module):
    """The module F: the blocks and the damped, noisy update. Weights are cast to the state's dtype at each use."""

    def __init__(self, model: EquilibriumReasoner, weight_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.rope = model.config, model.rope()
        blocks = model.weights().to(weight_dtype).blocks
        self.blocks = nn.ModuleList(nn.ParameterList(w.detach() for w in block) for block in blocks)

    def forward(self, z: Tensor, injection: Tensor, noise_scale: Tensor) -> Tensor:
        u = z + injection
        for weights in self.blocks:
            u = self._block(u, BlockWeights(*[w.to(u.dtype) for w in weights]))  # type: ignore[attr-defined]
        return (1 - self.config.lambda_) * z + self.config.lambda_ * u + torch.randn_like(z) * noise_scale

    def _block(self, u: Tensor, weights: BlockWeights) -> Tensor:
        eps = self.config.rms_norm_eps
        if self.config.mlp_t:
            t = u.transpose(1, 2)
            u = reference.rms_norm(t + reference.swiglu(t, weights.mixer_in, weights.mixer_out), eps).transpose(1, 2)
        else:
            u = reference.rms_norm(u + reference.attention(u, weights, self.rope, self.config), eps)
        return reference.rms_norm(u + reference.swiglu(u, weights.gate_up, weights.down), eps)


class EagerStep:
    """One outer step with its embedding and heads.

    Args:
        weight_dtype: that of the stored weights; where it is not `dtype`, that of the state, they are cast at each use.
        core: what runs F, `Core` itself by default.
    """

    def __init__(
        self,
        model: EquilibriumReasoner,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        core: Module | None = None,
    ) -> None:
        self.config: EqRConfig = model.config
        self.dtype = dtype
        self.core = Core(model, weight_dtype) if core is None else core
        self.weights = model.weights().to(weight_dtype)

    def __call__(
        self, z_H: Tensor, z_L: Tensor, tokens: Tensor, noise_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_H, z_L [n, S, d], tokens [n, S] -> the next z_H and z_L, logits [n, S, V], q_halt [n]."""
        embedding = self.weights.embedding.to(self.dtype)
        e = math.sqrt(self.config.hidden_size) * F.embedding(tokens, embedding)
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                z_L = self.core(z_L, z_H + e, noise_scale)
            z_H = self.core(z_H, z_L, noise_scale)
        logits = F.linear(z_H, self.weights.lm_head.to(self.dtype))
        q = F.linear(z_H[:, 0], self.weights.q_weight.to(self.dtype), self.weights.q_bias.to(self.dtype))
        return z_H, z_L, logits, q[:, 0].float()
