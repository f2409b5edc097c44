"""AdamATan2 and Muon, gradients averaged over processes, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AdamATan2(torch.optim.Optimizer):
    """Adam with the division replaced by atan2, so that it has no epsilon and is invariant to the gradient's scale.

    p *= 1 - lr * weight_decay;  p -= lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t)), with m and v the moving
    averages of the gradient and of its square (Adam-atan2 of Everett et al., "Scaling exponents across
    parameterizations and optimizers", arXiv 2407.05872, in the form that EqR and its predecessors train with).

    Args:
        params: parameters to train.
        lr: learning rate.
        betas: decay of m and of v.
        weight_decay: decoupled, multiplied by lr.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 1.0,
    ) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ages: dict[int, list[Tensor]] = {}  # parameters by the number of their update
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                self.state[p]["step"] += 1
                ages.setdefault(self.state[p]["step"], []).append(p)
            for age, params in ages.items():
                grads = [p.grad for p in params if p.grad is not None]
                m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
                self._update(params, grads, m, v, group, age)
        return loss

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        group: dict[str, Any],
        age: int,
    ) -> None:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        # One launch for all parameters, where torch has one: a GPU would wait for the host's launches.
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
        roots = torch._foreach_sqrt(v)
        torch._foreach_div_(roots, math.sqrt(1 - beta2**age))
        torch._foreach_mul_(params, 1 - lr * decay)
        changes = [torch.atan2(mean, root) for mean, root in zip(m, roots, strict=True)]
        torch._foreach_add_(params, changes, alpha=-lr / (1 - beta1**age))


class Optimizers:
    """What trains a model's parameters: AdamATan2 all, or Muon the matrices of the blocks and AdamATan2 the rest.

    Muon (Jordan et al., 2024) moves a matrix by the orthogonal factor of its momentum. It is scaled as in "Muon is
    scalable for LLM training" (arXiv 2502.16982, section 2.2): an update's root mean square is 0.2 times the rate.

    Args:
        named: parameters by name.
        kind: "adam_atan2" or "muon".
        adam: makes AdamATan2 of parameters, with its rate and decay.
        lr: of AdamATan2.
        muon_lr, weight_decay: of Muon; its rate keeps its ratio to `lr` when that changes.
        in_blocks: whether the parameter of this name is a matrix of a block.

    Raises:
        ValueError: another kind.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        kind: str,
        adam: Callable[[list[nn.Parameter]], AdamATan2],
        *,
        lr: float,
        muon_lr: float,
        weight_decay: float,
        in_blocks: Callable[[str], bool],
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"optimizer must be one of {', '.join(KINDS)}, got {kind!r}")
        # A rate of 0 stays 0 along its schedule, whatever it is multiplied by.
        self._ratio = muon_lr / lr if lr else 1.0
        matrices = {name: p for name, p in named.items() if kind == "muon" and in_blocks(name) and p.ndim == 2}
        others = {name: p for name, p in named.items() if name not in matrices}
        self._parts: list[tuple[torch.optim.Optimizer, Mapping[str, nn.Parameter], tuple[str, ...]]] = [
            (adam(list(others.values())), others, ("exp_avg", "exp_avg_sq"))
        ]
        if matrices:
            muon = torch.optim.Muon(
                list(matrices.values()), lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self._parts.append((muon, matrices, ("momentum_buffer",)))

    @property
    def lr(self) -> float:
        """The learning rate of AdamATan2 at the next update."""
        return float(self._parts[0][0].param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for part, _, _ in self._parts:
            for group in part.param_groups:
                group["lr"] = value * (1.0 if isinstance(part, AdamATan2) else self._ratio)

    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for part, _, _ in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for part, _, _ in self._parts:
            part.zero_grad(set_to_none=True)

    def moment_names(self) -> dict[str, nn.Parameter]:
        """The parameter of each moment there is after the first update: "exp_avg.PARAMETER" and the like."""
        return {f"{key}.{name}": p for _, named, keys in self._parts for name, p in named.items() for key in keys}

    def moments(self) -> dict[str, Tensor]:
        """The moments by those names, each float32 of its parameter's shape; none before a step."""
        states = [(part.state[p], name, keys) for part, named, keys in self._parts for name, p in named.items()]
        return {f"{key}.{name}": state[key] for state, name, keys in states if state for key in keys}

    def load(self, moments: Mapping[str, Tensor], step: int) -> None:
        """Puts back what `moments` gave after `step` updates."""
        for part, named, keys in self._parts:
            for name, p in named.items():
                part.state[p].update({key: moments[f"{key}.{name}"].to(p.device).float() for key in keys})
                if isinstance(part, AdamATan2):
                    part.state[p]["step"] = step


KINDS = ("adam_atan2", "muon")


class EMA:
    """Exponential moving average of a module's parameters, which evaluation uses.

    Update t, counted from 1, keeps min(rate, (1 + t) / (10 + t)) of the average: early on that spans the last tenth or
    so of the updates, so that where the module started is forgotten however few there are. `rate` itself is reached
    after `warm_up(rate)` updates.

    Args:
        module: whose parameters are followed; the average starts at their values.
        rate: weight of the old average at every update, once there have been enough.

    Attributes:
        updates: so far.
    """

    def __init__(self, module: nn.Module, rate: float = 0.999) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        self.rate, self.updates = rate, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @staticmethod
    def warm_up(rate: float) -> int:
        """Updates until the average keeps `rate` of itself."""
        return max(0, math.ceil((10 * rate - 1) / (1 - rate)))

    def next_rate(self) -> float:
        """What the next update keeps of the average."""
        return min(self.rate, (2 + self.updates) / (11 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's present parameters."""
        params = dict(module.named_parameters())
        kept = self.next_rate()
        torch._foreach_lerp_(list(self.shadow.values()), [params[name] for name in self.shadow], 1 - kept)
        self.updates += 1


def average_gradients(params: Iterable[nn.Parameter], world: int) -> None:
    """Puts the mean over the `world` processes of the default group in place of each parameter's gradient."""
    params = [p for p in params if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in params])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= world
    for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = grad.view_as(p)
