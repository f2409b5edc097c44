"""`eqr train --init`: a new run that starts from the weights of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eqr_kernels.checkpoint import Checkpoint, MissingConfigError, load_checkpoint
from eqr_kernels.config import TRM_FIELDS, EqRConfig

_START_BUFFERS = ("H_init", "L_init")
_OF_THE_WEIGHTS = ("vocab_size", "hidden_size", "expansion", "L_layers", "mlp_t")
_OF_ATTENTION = ("num_heads", "pos_encodings", "rope_theta", "board_height", "board_width")


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from.

    Attributes:
        state_dict: weights by the official keys, on the CPU, in the file's dtypes; they fit `config`.
        config: the operator that the run trains.
        record: JSON values for the run's settings and its card: source, the file's sha256, the data and steps that it
            was trained with as far as its card tells, where the config comes from, and each of its fields that was
            changed, as [before, now].
        task, task_object: of its card.
    """

    state_dict: dict[str, Tensor]
    config: EqRConfig
    record: dict[str, Any]
    task: str = ""
    task_object: str = ""

    def __str__(self) -> str:
        steps = "" if self.record["steps"] is None else f"{self.record['steps']:,} steps, "
        changes = [f"{name} {before} -> {now}" for name, (before, now) in self.record["changed"].items()]
        return (
            f"starting from the weights of {self.record['source']} ({steps}sha256 {self.record['sha256'][:12]}), "
            f"config of {self.record['config']}, changed: {', '.join(changes) or 'nothing'}"
        )


def initial_weights(source: str, changes: dict[str, Any], preset: EqRConfig | None) -> InitialWeights:
    """Weights to train on, with the config that they came with but for `preset` and `changes`.

    A TRM (a fixed start) becomes an EqR: a random start, and where it has no damping and noise those of the defaults
    (lambda_ 0.95, noise_scale 0.01), but for those of the three fields that `changes` names.

    Args:
        source: as `load_checkpoint` takes it.
        changes: fields of the config by name, as --set gives them.
        preset: the config of --preset, which the checkpoint's gives way to; None keeps the checkpoint's.

    Raises:
        As `load_checkpoint`; ValueError: the file does not say its config and there is no preset, or a field would
            change that the weights belong to.
    """
    try:
        loaded = load_checkpoint(source)
    except MissingConfigError as error:
        if preset is None:
            raise ValueError(
                f"--init {source} does not say which config its weights were trained with ({error}); "
                "give --preset, and --set for the fields that differ from it"
            ) from error
        loaded = load_checkpoint(source, EqRConfig.from_dict({**preset.to_dict(), **changes}))
        return _starting_from(loaded, source, loaded.config, "--preset and --set, as the file has none")
    fields = (preset or loaded.config).to_dict()
    if preset is None and loaded.config.fixed_init:
        fields |= {name: getattr(EqRConfig(), name) for name, of_trm in TRM_FIELDS.items() if fields[name] == of_trm}
    config = EqRConfig.from_dict({**fields, **changes})
    _check_kept(source, loaded.config, config)
    return _starting_from(loaded, source, config, "the checkpoint" if preset is None else "--preset")


def _changes(before: EqRConfig, now: EqRConfig) -> dict[str, list[Any]]:
    values = now.to_dict()
    return {name: [value, values[name]] for name, value in before.to_dict().items() if value != values[name]}


def _check_kept(source: str, old: EqRConfig, config: EqRConfig) -> None:
    """Raises a ValueError where weights of the old config have no place, or no meaning, in the new one."""
    changed = _changes(old, config)
    kept = _OF_THE_WEIGHTS + (("seq_len",) if old.mlp_t else _OF_ATTENTION)
    wrong = [f"{name} {changed[name][0]!r} -> {changed[name][1]!r}" for name in kept if name in changed]
    if wrong:
        may = sorted({field.name for field in dataclasses.fields(EqRConfig)} - {*kept})
        raise ValueError(
            f"--init {source}: --preset and --set must keep the fields that the weights belong to, got "
            f"{', '.join(wrong)}; leave them as they are in the checkpoint, or train anew without --init. "
            f"Fields that may change: {', '.join(may)}"
        )
    if config.fixed_init and not old.fixed_init:
        raise ValueError(
            f"--init {source}: fixed_init=true needs the start states {' and '.join(_START_BUFFERS)}, which the "
            "checkpoint does not have; start at random, with --set fixed_init=false where --preset says otherwise"
        )


def _starting_from(loaded: Checkpoint, source: str, config: EqRConfig, config_of: str) -> InitialWeights:
    state_dict = {
        name: tensor for name, tensor in loaded.state_dict.items() if config.fixed_init or name not in _START_BUFFERS
    }
    with Path(loaded.origin).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "source": str(source),
        "sha256": sha256,
        "data": loaded.card.data,
        "steps": loaded.card.steps,
        "config": config_of,
        "changed": _changes(loaded.config, config),
    }
    return InitialWeights(state_dict, config, record, loaded.card.task, loaded.card.task_object)
