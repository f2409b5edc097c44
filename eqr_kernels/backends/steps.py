"""The reference backend's outer step: of the plain operator with cast weights, or of a model through its modules."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor

from eqr_kernels import noise, ops, reference
from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.graphed import StepInputs, StepOutputs
from eqr_kernels.modules import EqROperator, LatentState


class OuterStep(Protocol):
    """One outer step of n rows. S tokens, d features."""

    def injection(self, tokens: Tensor) -> Tensor:
        """What a step takes of its rows' tokens, int64 [n, S] -> [n, S, ...]."""

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        """The step and its heads."""


def no_damped_update(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `ops.damped_update` cannot serve on a device, or None when it can."""
    built, reason = ops.extension_status()
    if not built:
        return reason
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"damped_update is compiled for float32 and bfloat16 on CPU, not for {dtype} on {device.type}"
    return None


class PlainStep:
    """The plain operator with a model's weights in the run's dtype.

    Work on the device alone, so that it can be captured.
    """

    def __init__(self, model: EqROperator, problem: FixedPointProblem) -> None:
        self.config, self.problem = model.config, problem
        self.weights = model.weights().to(problem.dtype)
        self.blocks = reference.all_blocks(self.weights, model.rope(), model.config)
        self.compiled = no_damped_update(model.device, problem.dtype) is None

    def injection(self, tokens: Tensor) -> Tensor:
        return reference.embed(tokens, self.weights)

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        c, p = self.config, self.problem
        last = c.updates_per_step - 1
        parked = {last: inputs.z_H, last - 1: inputs.z_L}  # the last updates of z_H and of z_L close the outer step
        squares = []

        def update(z: Tensor, u: Tensor, m: int) -> Tensor:
            z_prev = parked.get(m)
            stream = noise.FIRST_UPDATE + m
            if self.compiled:
                out, change, size = ops.damped_update(z, u, inputs.rng, stream, c.lambda_, p.noise_scale, z_prev)
            else:
                eps = noise.normal(inputs.rng, stream, tuple(z.shape[1:]), z.dtype) if p.noise_scale else None
                out = reference.damped_update(z, u, eps, c.lambda_, p.noise_scale)
                if z_prev is not None:
                    change, size = _squares(out, z_prev)
            if z_prev is not None:
                squares.append((change, size))
            return out

        z_H, z_L = reference.outer_step(inputs.z_H, inputs.z_L, inputs.injection, self.blocks, c, update)
        logits, q_halt = reference.heads(z_H, self.weights)
        return StepOutputs(z_H, z_L, _residual(squares), logits.float(), q_halt.float())


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
        result = self.model(inputs.injection, state, **self.keywords)
        after, logits, q_halt = self._checked(result, inputs)
        squares = [_squares(after.z_H, inputs.z_H), _squares(after.z_L, inputs.z_L)]
        return StepOutputs(after.z_H, after.z_L, _residual(squares), logits.float(), q_halt.float())

    def _checked(self, result: object, inputs: StepInputs) -> tuple[LatentState, Tensor, Tensor]:
        c, (n, tokens, _) = self.model.config, inputs.z_H.shape
        if isinstance(result, tuple) and len(result) == 3 and isinstance(result[0], LatentState):
            state, logits, q_halt = result
            states = (state.z_H, state.z_L)
            same = all(z.shape == inputs.z_H.shape and z.dtype == inputs.z_H.dtype for z in states)
            if same and logits.shape == (n, tokens, c.vocab_size) and q_halt.shape == (n,):
                return state, logits, q_halt
        raise TypeError(
            f"forward of {type(self.model).__name__} must give (LatentState of {inputs.z_H.dtype} "
            f"{list(inputs.z_H.shape)}, logits [{n}, {tokens}, {c.vocab_size}], q_halt [{n}]), got {_kinds(result)}"
        )


def _squares(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """||after - before||^2 and ||after||^2 of each row [n], of [n, S, d]."""
    wide = reference.wide(after)
    return (wide - reference.wide(before)).square().sum((1, 2)), wide.square().sum((1, 2))


def _residual(squares: list[tuple[Tensor, Tensor]]) -> Tensor:
    """r = ||z - z_before|| / ||z|| over (z_H, z_L), float32 [n] (EqR, arXiv 2605.21488, section 4)."""
    (change, size), (more_change, more_size) = squares
    change, size = change + more_change, size + more_size
    # A state that is zero and stays so has settled: 0 / 0 counts as 0.
    return torch.sqrt(change / size).masked_fill((change == 0) & (size == 0), 0.0).float()


def _kinds(result: object) -> str:
    if isinstance(result, LatentState):
        return f"LatentState of {result.z_H.dtype} {list(result.z_H.shape)}"
    if isinstance(result, Tensor):
        return f"{result.dtype} {list(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_kinds, result))})"
    return type(result).__name__
