"""`EquilibriumReasoner`: the operator with its card, loaded from anywhere and solved to its fixed points."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor

from eqr_kernels import solver
from eqr_kernels.checkpoint import expected_shapes, load_checkpoint, save_checkpoint
from eqr_kernels.config import EqRConfig
from eqr_kernels.differentiable_step import differentiable_step, why_not_differentiable
from eqr_kernels.modifications import modification
from eqr_kernels.modules import EqROperator, LatentState


class EquilibriumReasoner(EqROperator):
    """An Equilibrium Reasoner (EqR, arXiv 2605.21488): a weight-tied operator iterated to its fixed point.

    Calling the module runs one outer step; `solve` runs each trajectory until it has settled. The state dict has the
    keys of the official checkpoints.

    Args:
        config: the operator's sizes; weights are drawn at random as the official code draws them.

    Attributes:
        card: what is known of the weights (training data, calibrated tolerance), see `ModelCard`.
        fused: whether a call of the module may take the fused kernel of training where there is one, see `step_kernel`.

    Examples:
        >>> model = EquilibriumReasoner(EqRConfig.sudoku_small()).eval()
        >>> state = model.initial_state(n=2, seed=0)
        >>> state, logits, q_halt = model(torch.ones(2, 81, dtype=torch.long), state)
        >>> logits.shape, q_halt.shape
        (torch.Size([2, 81, 11]), torch.Size([2]))
    """

    solve = solver.solve
    fused = True

    def step_kernel(self, tokens: Tensor, state: LatentState) -> str:
        """What `model(tokens, state)` would run here and now, and why nothing faster.

        In bfloat16 on CPU (`torch.autocast("cpu", torch.bfloat16)`, or `model.bfloat16()`) a step of which gradients
        are wanted is one fused kernel forward and one backward. States and sums are float32 in it, and the gradient is
        a first one, by weights alone. Everything else runs through the modules: without gradients, in other
        arithmetic, under torch.compile, with hooks or replaced layers, with a gradient of the state.

        Args:
            tokens: integers [n, S]. state: of the same n rows.
        """
        why = self._why_not_fused(tokens, state)
        return "fused CPU kernel, forward and backward" if why is None else f"PyTorch: {why}"

    def _why_not_fused(self, tokens: Tensor, state: LatentState) -> str | None:
        return why_not_differentiable(self, tokens, state) if self.fused else "model.fused is off"

    def _outer_step(self, tokens: Tensor, state: LatentState, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._why_not_fused(tokens, state) is None:
            return differentiable_step(self, tokens, state, scale)
        return super()._outer_step(tokens, state, scale)

    @classmethod
    def from_pretrained(
        cls, source: str | PathLike[str], config: EqRConfig | None = None, *, revision: str | None = None
    ) -> EquilibriumReasoner:
        """A model, in eval mode, from a shipped name, an official `.pth`, a `.safetensors`, a folder or a hub id.

        It is on the CPU, in the dtype of the file, and can be trained, whatever torch's default device, default dtype
        and inference mode are. See `eqr_kernels.checkpoint.load_checkpoint` for what each source may hold and for the
        errors.
        """
        with torch.inference_mode(False), torch.device("cpu"):
            loaded = load_checkpoint(source, config, revision=revision)
            model = cls(loaded.config, card=loaded.card).to(loaded.dtype)
            model.load_state_dict(loaded.state_dict)
        return model.eval()

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Writes weights (safetensors) and card (JSON) to a folder or a `.safetensors` path, atomically.

        Raises:
            RuntimeError: the model is not made of the plain operator's weights any more, or they are not finite.
        """
        weights = self.state_dict()
        plain = set(weights) == set(expected_shapes(self.config)) and all(type(w) is Tensor for w in weights.values())
        # Parametrised weights count as modified in training alone, and are saved under other names too.
        if not plain and (why := modification(self, training=True)):
            raise RuntimeError(
                f"{why}, so that its weights are not those of the plain operator; merge or remove it first (adapters: "
                "merge_and_unload, pruning: prune.remove, weight norm: remove_weight_norm or "
                "parametrize.remove_parametrizations, quantised tensors: dequantize), or save model.state_dict() with "
                "torch.save"
            )
        save_checkpoint(path, weights, self.config, self.card)
