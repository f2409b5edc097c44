"""What a training run is set to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eqr_kernels.tasks.stream import parse_curriculum, parse_mix
from eqr_kernels.training.cycles import parse_cycles
from eqr_kernels.training.optim import KINDS
from eqr_kernels.training.recipes import COMMON, DECAY_END, DEFAULT_PRESET, FINE_TUNING, RECIPES


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Defaults are the schedule of the preset `sudoku-paper`, as published, but in float32.

    Attributes:
        batch_size: rows of this process; torchrun multiplies it by the number of processes.
        attention_init: "random" draws attention as everything else, "local" lets each head begin at a neighbour on the
            board; see `local_attention.look_at_neighbours`.
        lr, lr_warmup_steps, lr_min_ratio, decay_from: see `learning_rate`; a ratio of 1 keeps it constant.
        optimizer: "adam_atan2" trains everything, "muon" the matrices of the blocks; see `optim.Optimizers`.
        muon_lr: rate of what Muon trains, which follows the schedule of `lr`; None takes `lr`.
        beta1, beta2: of AdamATan2.
        weight_decay: decoupled, multiplied by the rate.
        ema_rate: of the averaged weights that are saved as the model; see `eqr_kernels.training.optim.EMA`.
        total_steps: where the cosine ends and training stops; None trains until the time limit.
        curriculum: how many clues are shown along the run, as `tasks.stream.parse_curriculum` reads it; "" shows none.
        mix: shares of the draws by source, as `tasks.stream.parse_mix` reads it; "" draws all puzzles alike.
        cycles: how the recursions of an outer step grow along the run, as `cycles.parse_cycles` reads it;
            "" keeps those of the model's config.
        forward_dtype: "float32" or "bfloat16"; parameters and optimizer stay in float32.
        slice_steps: training steps between two saves; None chooses them from the speed of the first steps.
        compile: compile the step with torch.compile.
        fused: use the fused CPU kernels where there are some for the device and `forward_dtype` (`Trainer.kernel`
            tells): in bfloat16 for the whole outer step, forward and backward, in float32 for the latent recursions
            that carry no gradient.
        workers: parts in which the fused outer step sums its gradients, which decides their last bits; None takes
            torch's number of threads.
        prefetch: draw puzzles and starts for every row at every step, the puzzles ahead in a thread, and keep those of
            the rows that halted: no step waits for the device or for a puzzle. False draws for the rows that halted
            alone, and trains on other puzzles. None prefetches on CUDA only.
        seed: of weights, data, starts and noise.

    Raises:
        ValueError: a value is out of its range, or a text of another form.
    """

    batch_size: int = 768
    attention_init: str = "random"
    lr: float = 1e-4
    lr_warmup_steps: int = 2000
    lr_min_ratio: float = 1.0
    decay_from: int | None = None
    optimizer: str = "adam_atan2"
    muon_lr: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 1.0
    ema_rate: float = 0.999
    total_steps: int | None = 50_000
    curriculum: str = ""
    mix: str = ""
    cycles: str = ""
    forward_dtype: str = "float32"
    slice_steps: int | None = None
    compile: bool = True
    fused: bool = True
    workers: int | None = None
    prefetch: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.forward_dtype not in ("float32", "bfloat16"):
            raise ValueError(f'forward_dtype must be "float32" or "bfloat16", got {self.forward_dtype!r}')
        if self.attention_init not in ("random", "local"):
            raise ValueError(f"attention_init must be random or local, got {self.attention_init!r}")
        if self.optimizer not in KINDS:
            raise ValueError(f"optimizer must be one of {', '.join(KINDS)}, got {self.optimizer!r}")
        if self.muon_lr is not None and (self.optimizer != "muon" or not 0 < self.muon_lr < math.inf or self.lr == 0):
            raise ValueError(
                "muon_lr must be positive, and needs optimizer 'muon' and an lr above 0, whose schedule it follows; "
                f"got {self.muon_lr!r} with {self.optimizer!r} and lr {self.lr!r}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name, least in (("total_steps", 1), ("workers", 1), ("slice_steps", 1), ("decay_from", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least} or None, got {value}")
        parse_cycles(self.cycles)
        parse_mix(self.mix)
        if self.curriculum:
            parse_curriculum(self.curriculum)

    @property
    def decay_begins(self) -> float:
        """The step from which on the rate falls; infinity where it does not."""
        if self.lr_min_ratio >= 1 or self.total_steps is None:
            return math.inf
        return float(self.lr_warmup_steps if self.decay_from is None else self.decay_from)

    def to_json(self) -> dict[str, Any]:
        """Every field by its name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainSettings:
        """The settings of `to_json`; other entries are passed over, and what is missing has its default.

        Files from before there was a fused kernel do not say `fused`: they were trained without.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{"fused": False, **{name: value for name, value in values.items() if name in names}})


def choose_settings(
    options: Mapping[str, Any],
    preset: str | None,
    stored: Mapping[str, Any],
    *,
    fine_tuning: bool = False,
    own_task: bool = True,
) -> dict[str, Any]:
    """Fields of `TrainSettings`: as the options say, else as the resumed run has them, else as the recipe has them.

    The presets' recipes are for training from nothing, so fine-tuning has one of its own. A mix takes the place of the
    recipe's curriculum, which another task has no use for either.

    Args:
        options: values by field; None leaves the choice open.
        preset: names the recipe; None takes the default's.
        stored: fields that the state of the resumed run holds; empty for a new run.
        own_task: whether the recipe is for the task that is trained.
    """
    recipe = {**COMMON, **(FINE_TUNING if fine_tuning else RECIPES[preset or DEFAULT_PRESET])}
    if options.get("mix") or not own_task:
        recipe["curriculum"] = ""
    return {**recipe, **stored, **{name: value for name, value in options.items() if value is not None}}


def complete_schedule(
    fields: dict[str, Any], minutes: float | None, finish: float | None, lr_min_ratio: float | None
) -> dict[str, Any]:
    """The fields of `TrainSettings` with the end of the decay that is asked for.

    Args:
        minutes, finish, lr_min_ratio: the options of `eqr train` by these names, None where they were not given.

    Raises:
        ValueError: nothing says when to stop, or where a decay ends.
    """
    total, begin, warmup = fields["total_steps"], fields["decay_from"], fields["lr_warmup_steps"]
    if total is None and minutes is None and finish is None:
        raise ValueError("nothing says when to stop; give --steps or --minutes")
    if begin is None and finish is None:
        if total is None and lr_min_ratio is not None and lr_min_ratio < 1:
            raise ValueError(f"--lr-min-ratio {lr_min_ratio:g} needs --steps, where the rate has come down")
        return fields
    if begin is not None and (total is None or total <= max(begin, warmup)):
        raise ValueError(
            f"--decay-from {begin} needs --steps beyond it and beyond the warm-up of {warmup}, where the rate has come "
            f"down, got {total}"
        )
    if fields["lr_min_ratio"] < 1:
        return fields
    if lr_min_ratio is not None:
        raise ValueError(f"--lr-min-ratio must be below 1 for the rate to fall, got {lr_min_ratio:g}")
    return {**fields, "lr_min_ratio": DECAY_END}
