"""How far the trajectories of a precision stray from fp32's, step by step: a check that needs no answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.studies.quantisation.displacement import States, arithmetic, distance, states_at
from eqr_kernels import noise
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.curve import powers_of_two


class Straying:
    """Trajectories of the baseline, beside which those of other precisions run from the same starts with its noise.

    Args:
        model: the baseline, float32.
        tokens: int64 [n, S], any puzzles.
        depth: outer steps. seed, noise_scale: as for `solve`.
    """

    def __init__(
        self, model: EquilibriumReasoner, tokens: Tensor, *, depth: int, seed: int, noise_scale: float
    ) -> None:
        self.model, self.tokens, self.noise_scale = model, tokens.to(model.device), noise_scale
        self.steps, self.seed = powers_of_two(depth), seed
        self.base = self._trajectories(model, "fp32", seed)

    def _trajectories(self, model: EquilibriumReasoner, precision: str, noise_seed: int) -> list[States]:
        """From the starts of the study's seed, with the noise of another."""
        start, drawn = (noise.make_rng(seed, 0, noise.hash_tokens(self.tokens), 0) for seed in (self.seed, noise_seed))
        z_H, z_L = self.model.start(start)
        begin = States(z_H, z_L, z_H.new_zeros(len(z_H)), self.tokens)
        return states_at(
            model,
            self.tokens,
            drawn,
            steps=self.steps,
            precision=precision,
            begin=begin,
            noise_scale=self.noise_scale,
        )

    def measure(self, model: EquilibriumReasoner, precision: str) -> dict[str, Any] | None:
        """How far they are from the baseline's after each of the steps; None where nothing gives states there."""
        if arithmetic(model, precision) is None:
            return None
        return self._compare(self._trajectories(model, precision, self.seed))

    def under_other_noise(self) -> dict[str, Any] | None:
        """What the baseline itself strays by, from the same starts with the noise of another seed; None without any."""
        if not self.noise_scale:
            return None
        return self._compare(self._trajectories(self.model, "fp32", (self.seed + 1) % 2**32))

    def _compare(self, here: list[States]) -> dict[str, Any]:
        pairs = list(zip(self.base, here, strict=True))
        away = [distance(one.z, base.z).double() for base, one in pairs]
        other = [(one.answers != base.answers).double() for base, one in pairs]
        return {
            "trajectories": len(self.tokens),
            "steps": list(self.steps),
            "median": [float(d.quantile(0.5)) for d in away],
            "p90": [float(d.quantile(0.9)) for d in away],
            "other_tokens": [float(cells.mean()) for cells in other],
            "other_answers": [float(cells.amax(1).mean()) for cells in other],
        }
