"""What a training run remembers of itself, in its state and in the card of its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from eqr_kernels import ops
from eqr_kernels.config import EqRConfig
from eqr_kernels.training.settings import TrainSettings

_MACHINE = ("kernel", "threads", "torch", "isa")


_KNOWN_OF_OLD = {"attention_init"}
"""Settings that came later, when there had been one way alone: its name is the default."""


@dataclass(frozen=True)
class RunRecord:
    """A run as its manifest and its card have it: one JSON object, the settings' fields beside those of this class.

    Attributes:
        settings: how it trains.
        config: the operator that it trains, before `settings.cycles` changes its cycles.
        data_sha256: of the puzzles and answers.
        processes: that train it together.
        init: `InitialWeights.record` of the weights that it began with; None where they were drawn by the seed.
        machine: what trains, as far as it decides last bits: kernel, threads, torch, and isa with the extension.
        seconds, cpu_seconds: of training up to the last save, as `Stopwatch` takes them.
        task, task_object: as in the model's card; "" in a manifest from before there were any.
        unsaid: settings that the manifest does not say, and that have their defaults here; without those of which an
            old manifest is known to have had them.
    """

    settings: TrainSettings
    config: EqRConfig
    data_sha256: str
    processes: int
    init: dict[str, Any] | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    unsaid: frozenset[str] = frozenset()
    task: str = ""
    task_object: str = ""

    def to_json(self) -> dict[str, Any]:
        """One flat object; `init` is left out where there is none."""
        record = {
            **self.settings.to_json(),
            "config": self.config.to_dict(),
            "data_sha256": self.data_sha256,
            "processes": self.processes,
            "task": self.task,
            "task_object": self.task_object,
            **self.machine,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        return record if self.init is None else {**record, "init": self.init}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunRecord:
        """The record of `to_json`, or of a manifest from before there was this class.

        Raises:
            KeyError: no config, no digest of the data or no number of processes.
        """
        return cls(
            TrainSettings.from_json(values),
            EqRConfig.from_dict(values["config"]),
            values["data_sha256"],
            values["processes"],
            values.get("init"),
            {name: values[name] for name in _MACHINE if name in values},
            values.get("seconds", 0.0),
            values.get("cpu_seconds", 0.0),
            frozenset(f.name for f in dataclasses.fields(TrainSettings) if f.name not in {*values, *_KNOWN_OF_OLD}),
            values.get("task", ""),
            values.get("task_object", ""),
        )

    @property
    def stored_settings(self) -> dict[str, Any]:
        """The settings that the manifest says."""
        return {name: value for name, value in self.settings.to_json().items() if name not in self.unsaid}


def machine_record(kernel: str) -> dict[str, Any]:
    """`RunRecord.machine` of this process, which trains with that kernel (`Trainer.kernel`)."""
    here = {"kernel": kernel, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {**here, "isa": ops.cpu_isa()} if ops.extension_status()[0] else here
