"""The slices of a training run: where they end, how long they are, and whether another fits into the time."""

from __future__ import annotations

import time

import torch

SLICE_SECONDS = 45.0
"""How long a slice should be: with its saving, what a killed run loses stays under a minute."""
# Compilation and the first allocations are over after these; the speed is measured over those that follow.
_WARM_STEPS, _MEASURED_STEPS = 3, 5


def slice_steps_for(seconds_per_step: float, lifetime: int) -> int:
    """Steps of a slice of about `SLICE_SECONDS`, a multiple of `lifetime` and at least twice that.

    All rows start afresh at a boundary: a multiple of the steps that a row has at most cuts none short that began with
    the slice, and shorter slices would hide the late steps of the others.
    """
    return lifetime * max(2, round(SLICE_SECONDS / seconds_per_step / lifetime))


class Slices:
    """Slices that end at the multiples of `steps`, at steps and not at times, so that a run can be repeated exactly.

    Args:
        steps: of a slice; None until it is chosen from the measured speed.
        start: training step that the command begins with, whose state is there already.
        device: to wait for before a clock is read.
        minutes: that the command may take from now on; None is any time.
    """

    def __init__(self, steps: int | None, start: int, device: torch.device, minutes: float | None) -> None:
        self.steps, self.start, self.device = steps, start, device
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.saving = 0.0
        self._mark: tuple[int, float] | None = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def measured(self, step: int) -> float | None:
        """Seconds a step at the one step where there is a first measurement of them, None at all others."""
        if step == self.start + _WARM_STEPS:
            self._mark = (step, self._now())
        if step == self.start + _WARM_STEPS + _MEASURED_STEPS:
            return self._seconds_per_step(step)
        return None

    def _seconds_per_step(self, step: int) -> float:
        assert self._mark is not None
        return (self._now() - self._mark[1]) / (step - self._mark[0])

    def leave_out(self, seconds: float) -> None:
        """So many seconds went by in something else than training steps."""
        if self._mark is not None:
            self._mark = (self._mark[0], self._mark[1] + seconds)

    def ends(self, step: int) -> bool:
        """Whether a slice ends with `step` steps done."""
        return self.steps is not None and step > self.start and step % self.steps == 0

    def out_of_time(self, step: int) -> bool:
        """Whether to stop: the time is over, or a slice ends here and the next would not end (and be saved) in time."""
        if self.deadline is None:
            return False
        left = self.deadline - (self._now() if self.ends(step) else time.monotonic())
        if left <= 0:
            return True
        if not self.ends(step) or self._mark is None or self._mark[0] >= step:
            return False
        assert self.steps is not None
        return self._seconds_per_step(step) * self.steps + 2 * self.saving > left

    def saved(self, step: int, seconds: float) -> None:
        """A slice has ended here, and its state was written in so many seconds."""
        self.saving = seconds
        if step > self.start + _WARM_STEPS:
            self._mark = (step, self._now())
