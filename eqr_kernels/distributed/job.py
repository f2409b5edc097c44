"""What is made of each unit: a `Job`, which is data, and the model that it is run with, as data too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors.torch import load, save

from eqr_kernels import ops
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.distributed.units import Unit
from eqr_kernels.modifications import modification
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies.identity import what_decides

_OPTIONS: dict[str, Any] = {"window": None, "noise_scale": None, "backend": "auto", "precision": "auto"}

Work = Callable[[Unit], Any]
"""unit -> a pyarrow.Table of what came of it"""


class Job(Protocol):
    """What is made of units. It travels as data, and `work` runs where the units come to.

    Attributes:
        settings: of the run; those of `solve` among them decide the answers.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    def work(self, model: EquilibriumReasoner) -> Work: ...


@dataclass(frozen=True)
class PackedModel:
    """A model as data: its weights as safetensors, which name no code.

    Attributes:
        card: JSON, with the config.
        device: on which it runs.
        instruction_set: of the cpu backend, which a machine takes whatever else it has: others round otherwise.
        options: of `solve`, and decides: what they make the answers depend on, see `what_decides`; it must be the same
            where the model is unpacked.
    """

    card: str
    device: str
    instruction_set: str | None
    options: dict[str, Any]
    decides: dict[str, Any]

    @classmethod
    def of(cls, model: EquilibriumReasoner, settings: Mapping[str, Any]) -> tuple[PackedModel, npt.NDArray[np.uint8]]:
        """The model for a job of these settings, but for its weights, and these, bytes [n].

        Raises:
            RuntimeError: it has hooks, adapters or other layers, which are code.
        """
        if why := modification(model, training=True):
            raise RuntimeError(f"{why}; a model on other machines is its weights and its config: merge or remove it")
        card = model.card or ModelCard(model.config)
        isa = ops.cpu_isa() if ops.extension_status()[0] else None
        options = {name: settings.get(name, default) for name, default in _OPTIONS.items()}
        packed = cls(card.to_json(), model.device.type, isa, options, _decides(model, options))
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
        return packed, np.frombuffer(save(weights), np.uint8)

    def unpack(self, weights: npt.NDArray[np.uint8]) -> EquilibriumReasoner:
        """The model, in eval mode.

        Raises:
            RuntimeError: this machine would give other answers; what to install.
        """
        if self.instruction_set is not None:
            ops.set_cpu_isa(self.instruction_set)
        card = ModelCard.from_json(self.card)
        state = load(weights.tobytes())
        dtypes = {weight.dtype for weight in state.values()}
        model = EquilibriumReasoner(card.config, card=card)
        if len(dtypes) == 1:
            model = model.to(dtypes.pop())
        model.load_state_dict(state)
        model = model.to(self.device).eval()
        here = _decides(model, self.options)
        differs = [f"{name} is {here[name]} here and {v} there" for name, v in self.decides.items() if here[name] != v]
        if differs:
            raise RuntimeError(
                f"this worker would answer otherwise than the machine where the command was given: {'; '.join(differs)}"
                "; install the same on all machines"
            )
        return model


def _decides(model: EquilibriumReasoner, options: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on all machines; which GPU it is need not."""
    return {name: value for name, value in what_decides(model, options).items() if name != "device"}
