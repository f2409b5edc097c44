"""A model's weights as they were when a request came."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from eqr_kernels.checkpoint.state_dict import START_BUFFERS, expected_shapes
from eqr_kernels.config import EqRConfig
from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.modules import EqROperator


class _Copy(EqROperator):
    """Without weights of its own."""

    def reset_parameters(self) -> None:
        pass  # would draw from torch's global generator


class FrozenWeights:
    """The last copy of a model, taken anew only where its weights have changed since."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._last: EqROperator | None = None

    def of(self, model: EqROperator) -> EqROperator:
        """A plain operator (see `modifications`) with the weights that the model has now, which nobody changes."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            now: dict[str, Tensor] = {name: attrgetter(name)(model).detach() for name in expected_shapes(model.config)}
            now |= {name: start.detach() for name in START_BUFFERS if (start := getattr(model, name)) is not None}
            last = self._last
            if last is None or last.config != model.config or not _same(now, last.state_dict()):
                last = self._last = _copy(model.config, now)
            return last


def _copy(config: EqRConfig, weights: dict[str, Tensor]) -> EqROperator:
    with torch.device("meta"):
        copy = _Copy(config)
    copy.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return copy.requires_grad_(False)


def _same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two sets of finite weights have the same names, kinds and values."""
    return some.keys() == others.keys() and all(
        weight.dtype == (other := others[name]).dtype
        and weight.device == other.device
        and weight.shape == other.shape
        and torch.equal(weight, other)
        for name, weight in some.items()
    )
