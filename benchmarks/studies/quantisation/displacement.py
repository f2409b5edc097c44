"""How far a precision moves fixed points: latent states without noise, from the same starts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.quantisation.paired import counted
from eqr_kernels import noise, ops, reference
from eqr_kernels.backends.packing import PackArguments, wrong_dtype
from eqr_kernels.precision import Precision
from eqr_kernels.reasoner import EquilibriumReasoner

NOISY_STEPS = 16
"""Outer steps from the fixed point after which two draws of the noise are compared."""
_CHUNK = 8  # rows at a time: with noise, all of an outer step's draws are in memory


@dataclass(frozen=True)
class States:
    """n trajectories after the full depth.

    Attributes:
        z_H, z_L: float32 [n, S, d].
        residual: float32 [n], of the last outer step.
        answers: int64 [n, S].
    """

    z_H: Tensor
    z_L: Tensor
    residual: Tensor
    answers: Tensor

    @property
    def z(self) -> Tensor:
        """float32 [n, 2 S d]."""
        return _joined((self.z_H, self.z_L))


def arithmetic(model: EquilibriumReasoner, precision: str) -> str | None:
    """What computes the states, in words; None where nothing here gives states in that precision."""
    if _why_no_kernel(model) is None:
        return f"compiled latent_recursions, {ops.cpu_isa()} {precision}, fp32 state"
    if not Precision[precision].dtype.is_floating_point:
        return None
    return f"plain PyTorch on {model.device}, {precision} throughout, state included"


def _why_no_kernel(model: EquilibriumReasoner) -> str | None:
    built, reason = ops.extension_status()
    if not built:
        return reason
    return f"the model is on {model.device}" if model.device.type != "cpu" else wrong_dtype(model)


@torch.no_grad()
def states_at(
    model: EquilibriumReasoner,
    tokens: Tensor,
    start: Tensor,
    *,
    steps: Collection[int],
    precision: str,
    begin: States | None = None,
    noise_scale: float = 0.0,
) -> list[States]:
    """The states after each of some numbers of outer steps.

    Args:
        model: float32.
        tokens: int64 [n, S] on the model's device.
        start: int64 [n, 4] on it, the counters (see `noise.make_rng`) of the random starts and, with a `noise_scale`,
            of the noise.
        steps: rising.
        precision: of `solve`; where `arithmetic` is None for it, ValueError.
        begin: states to go on from, instead of the random starts.

    Raises:
        ValueError: nothing here gives states in this precision.
    """
    if arithmetic(model, precision) is None:
        raise ValueError(f"precision={precision!r} gives no states here: {_why_no_kernel(model)}; use fp32 or bf16")
    step = _kernel_step(model, precision) if _why_no_kernel(model) is None else _plain_step(model, precision)
    parts = []
    for first in range(0, len(tokens), _CHUNK):
        rows = slice(first, first + _CHUNK)
        z = model.start(start[rows]) if begin is None else (begin.z_H[rows], begin.z_L[rows])
        parts.append(_iterate(model, step, tokens[rows], z, start[rows], steps, noise_scale))
    return [
        States(*(torch.cat([getattr(part, field.name) for part in at_one]) for field in fields(States)))
        for at_one in zip(*parts, strict=True)
    ]


def states(model: EquilibriumReasoner, tokens: Tensor, start: Tensor, *, depth: int, **options: Any) -> States:
    """The states after `depth` outer steps; the rest as `states_at`."""
    (end,) = states_at(model, tokens, start, steps=(depth,), **options)
    return end


def _iterate(
    model: EquilibriumReasoner,
    step: Any,
    tokens: Tensor,
    z: tuple[Tensor, Tensor],
    start: Tensor,
    steps: Collection[int],
    scale: float,
) -> list[States]:
    c = model.config
    reached = []
    for k in range(max(steps)):
        eps = None
        if scale:
            rng = noise.make_rng(start[:, 0], start[:, 1], start[:, 2], k)
            shape = (c.seq_len, c.hidden_size)
            draws = [noise.normal(rng, noise.FIRST_UPDATE + m, shape, torch.float32) for m in range(c.updates_per_step)]
            eps = torch.stack(draws)
        after = step(tokens, *z, eps, scale)
        if k + 1 in steps:
            change = distance(_joined(after), _joined(z))
            logits = torch.nn.functional.linear(after[0].float(), model.lm_head.weight)
            reached.append(States(after[0].float(), after[1].float(), change, logits.argmax(-1)))
        z = after
    return reached


def _kernel_step(model: EquilibriumReasoner, precision: str) -> Any:
    packed = PackArguments.of(model).pack(Precision[precision])

    def step(tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        count = model.config.H_cycles
        return ops.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale=scale, count=count)

    return step


def _plain_step(model: EquilibriumReasoner, precision: str) -> Any:
    c, dtype = model.config, Precision[precision].dtype
    weights = model.weights().to(dtype)
    blocks = reference.all_blocks(weights, model.rope(), c)

    def step(tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        def update(z: Tensor, u: Tensor, number: int) -> Tensor:
            return reference.damped_update(z, u, None if eps is None else eps[number].to(dtype), c.lambda_, scale)

        e = reference.embed(tokens, weights)
        return reference.outer_step(z_H.to(dtype), z_L.to(dtype), e, blocks, c, update)

    return step


def _joined(z: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1).float() for part in z], 1)


def distance(z: Tensor, base: Tensor) -> Tensor:
    """||z - base|| / ||base||: float32 [n, m] twice -> [n]."""
    return (z - base).norm(dim=1) / base.norm(dim=1)


class Probe:
    """Some puzzles of the baseline, against which other precisions are held.

    Args:
        model: the baseline, float32.
        tokens: int64 [n, S], puzzles that settle.
        depth: outer steps. tol: residual that counts as settled. seed: of the starts, as for `solve`.
    """

    def __init__(self, model: EquilibriumReasoner, tokens: Tensor, *, depth: int, tol: float, seed: int) -> None:
        self.model, self.tokens, self.depth, self.tol, self.seed = model, tokens.to(model.device), depth, tol, seed
        self.base = self._states(model, "fp32")
        # The slowest modes still creep: what goes on from here is held against fp32 that goes on as well.
        self.later = self._on(model, "fp32")

    def _rng(self, restart: int, seed: int) -> Tensor:
        return noise.make_rng(seed, restart, noise.hash_tokens(self.tokens), 0)

    def _states(self, model: EquilibriumReasoner, precision: str, restart: int = 0) -> States:
        return states(model, self.tokens, self._rng(restart, self.seed), depth=self.depth, precision=precision)

    def _on(self, model: EquilibriumReasoner, precision: str) -> States:
        """Where a model leads from the baseline's fixed points."""
        rng = self._rng(0, self.seed)
        return states(model, self.tokens, rng, depth=self.depth, precision=precision, begin=self.base)

    def _noisy(self, noise_scale: float, seed: int) -> States:
        """Where the noise of a seed leads from the baseline's fixed points."""
        return states(
            self.model,
            self.tokens,
            self._rng(0, seed % 2**32),
            depth=NOISY_STEPS,
            precision="fp32",
            begin=self.base,
            noise_scale=noise_scale,
        )

    def measure(self, model: EquilibriumReasoner, precision: str, tol: float) -> dict[str, Any] | None:
        """How far the states are from the baseline's, relatively; None where there are none in that precision.

        From the same starts, and ("from_fixed_point") both going on as long again from the baseline's end: the latter
        tells whether an attractor is still there and how far it moved, whatever way a trajectory from the start takes.

        Args:
            tol: residual that counts as settled in this precision.
        """
        how = arithmetic(model, precision)
        if how is None:
            return None
        here = self._states(model, precision)
        still = self._compare(self.later, self._on(model, precision), tol)
        of = int((self.later.residual <= self.tol).sum())
        return {
            "arithmetic": how,
            **self._compare(self.base, here, tol),
            "from_fixed_point": {**still, "lost": counted(of - still["same_basin"], of)},
            "noise_free_residual": float(here.residual.median()),
        }

    def spread(self, noise_scale: float) -> dict[str, Any]:
        """The baseline against itself: what a distance has to be compared with."""
        two_restarts = self._compare(self.base, self._states(self.model, "fp32", restart=1), self.tol)
        two_draws = None
        if noise_scale:
            two_draws = self._compare(*(self._noisy(noise_scale, self.seed + more) for more in (0, 1)), self.tol)
        return {
            "arithmetic": arithmetic(self.model, "fp32"),
            "depth": self.depth,
            "noise_free_residual": float(self.base.residual.median()),
            "two_noise_draws": two_draws,
            "two_restarts": two_restarts,
        }

    def _compare(self, base: States, here: States, tol: float) -> dict[str, Any]:
        """Distances where both have settled on one answer; elsewhere they are no displacement of one point."""
        same = (base.answers == here.answers).all(1) & (base.residual <= self.tol) & (here.residual <= tol)
        far = distance(here.z, base.z)[same].double().cpu().numpy()
        quantiles = np.quantile(far, (0.5, 0.9, 1)).tolist() if len(far) else (None, None, None)
        named = dict(zip(("median", "p90", "max"), quantiles, strict=True))
        return {"trajectories": len(same), "same_basin": int(same.sum()), **named}
