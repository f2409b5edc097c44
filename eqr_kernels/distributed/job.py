"""What is made of each unit: a `Job`, which is data, and the model that it is run with, as data too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save

import eqr_kernels
from eqr_kernels import ops
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.distributed.units import Unit
from eqr_kernels.modifications import modification
from eqr_kernels.reasoner import EquilibriumReasoner

Work = Callable[[Unit], Any]
"""unit -> a pyarrow.Table of what came of it"""


class Job(Protocol):
    """What is made of units. It travels as data, and `work` runs where the units come to."""

    def work(self, model: EquilibriumReasoner) -> Work: ...


@dataclass(frozen=True)
class PackedModel:
    """A model as data: its weights as safetensors, which name no code.

    Attributes:
        card: JSON, with the config.
        device: on which it runs.
        versions: of what its answers depend on; another machine must have the same.
        instruction_set: of the cpu backend, which a machine takes whatever else it has: others round otherwise.
    """

    card: str
    device: str
    versions: tuple[tuple[str, str], ...]
    instruction_set: str | None

    @classmethod
    def of(cls, model: EquilibriumReasoner) -> tuple[PackedModel, npt.NDArray[np.uint8]]:
        """The model but for its weights, and these, bytes [n].

        Raises:
            RuntimeError: it has hooks, adapters or other layers, which are code.
        """
        if why := modification(model, training=True):
            raise RuntimeError(f"{why}; a model on other machines is its weights and its config: merge or remove it")
        card = model.card or ModelCard(model.config)
        isa = ops.cpu_isa() if ops.extension_status()[0] else None
        packed = cls(card.to_json(), model.device.type, _versions(), isa)
        weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
        return packed, np.frombuffer(save(weights), np.uint8)

    def unpack(self, weights: npt.NDArray[np.uint8]) -> EquilibriumReasoner:
        """The model, in eval mode.

        Raises:
            RuntimeError: this machine would give other answers; what to install.
        """
        here = dict(_versions())
        for name, version in self.versions:
            if here[name] != version:
                raise RuntimeError(
                    f"this worker has {name} {here[name]}, and the command was given with {version}; install the same "
                    "on all machines, as others may answer otherwise"
                )
        if self.instruction_set is not None:
            ops.set_cpu_isa(self.instruction_set)
        card = ModelCard.from_json(self.card)
        state = load(weights.tobytes())
        dtypes = {weight.dtype for weight in state.values()}
        model = EquilibriumReasoner(card.config, card=card)
        if len(dtypes) == 1:
            model = model.to(dtypes.pop())
        model.load_state_dict(state)
        return model.to(self.device).eval()


def _versions() -> tuple[tuple[str, str], ...]:
    return ("eqr_kernels", eqr_kernels.__version__), ("torch", torch.__version__)
