"""The reference backend's outer step: of the plain operator with cast weights, or of a model through its modules."""

from __future__ import annotations

import inspect
from typing import Protocol

from torch import Tensor

from eqr_kernels import noise, ops, reference
from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.graphed import StepInputs, StepOutputs
from eqr_kernels.modifications import called
from eqr_kernels.modules import EqROperator, LatentState
from eqr_kernels.update import damped_update, residual, squares, why_not_fused_update


class OuterStep(Protocol):
    """One outer step of n rows. S tokens, d features."""

    def injection(self, tokens: Tensor) -> Tensor:
        """What a step takes of its rows' tokens, int64 [n, S] -> [n, S, ...]."""

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        """The step and its heads."""


class PlainStep:
    """The plain operator with a model's weights in the run's dtype.

    Work on the device alone, so that it can be captured.
    """

    def __init__(self, model: EqROperator, problem: FixedPointProblem) -> None:
        self.config, self.problem = model.config, problem
        self.weights = model.weights().to(problem.dtype)
        self.blocks = reference.all_blocks(self.weights, model.rope(), model.config)
        # Not in Triton on a GPU: the reference there is PyTorch alone, to measure the Triton backend against.
        self.fused = ops.damped_update if why_not_fused_update(model.device, problem.dtype) is None else None

    def injection(self, tokens: Tensor) -> Tensor:
        return reference.embed(tokens, self.weights)

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        c, p = self.config, self.problem
        last = c.updates_per_step - 1
        parked = {last: inputs.z_H, last - 1: inputs.z_L}  # the last updates of z_H and of z_L close the outer step
        changes: list[tuple[Tensor, Tensor]] = []

        def update(z: Tensor, u: Tensor, m: int) -> Tensor:
            z_prev = parked.get(m)
            keyed = (inputs.rng, noise.FIRST_UPDATE + m, c.lambda_, p.noise_scale)
            out, change, size = damped_update(z, u, *keyed, z_prev, self.fused)
            if z_prev is not None:
                changes.append((change, size))
            return out

        z_H, z_L = reference.outer_step(inputs.z_H, inputs.z_L, inputs.injection, self.blocks, c, update)
        logits, q_halt = reference.heads(z_H, self.weights)
        return StepOutputs(z_H, z_L, residual(changes), logits.float(), q_halt.float())


class ModuleStep:
    """A model called as its user made it, in its own dtype: hooks, replaced layers and an overridden `forward` count.

    Raises:
        TypeError: `forward` takes no noise_scale although the run's is not the config's, or gives something else than
            (state, logits, q_halt).
    """

    def __init__(self, model: EqROperator, problem: FixedPointProblem) -> None:
        self.model, self.keywords = model, {}
        scale, configured = problem.noise_scale, model.config.noise_scale
        if scale != configured:
            parameters = inspect.signature(model.forward).parameters.values()
            if not any(p.name == "noise_scale" or p.kind is p.VAR_KEYWORD for p in parameters):
                raise TypeError(
                    f"noise_scale={scale:g} differs from the config's {configured:g}, and forward of "
                    f"{type(model).__name__} takes no noise_scale; add that argument to it, or pass "
                    f"noise_scale={configured:g}"
                )
            self.keywords = {"noise_scale": scale}

    def injection(self, tokens: Tensor) -> Tensor:
        return tokens

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        seed, restart, ids, step = inputs.rng.unbind(1)
        state = LatentState(inputs.z_H, inputs.z_L, seed, ids, restart, step)
        after, logits, q_halt = called(self.model, inputs.injection, state, **self.keywords)
        changes = [squares(after.z_H, inputs.z_H), squares(after.z_L, inputs.z_L)]
        return StepOutputs(after.z_H, after.z_L, residual(changes), logits.float(), q_halt.float())
