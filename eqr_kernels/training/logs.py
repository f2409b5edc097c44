"""What a training run reports as it goes, and TensorBoard as one that takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eqr_kernels.training.evaluation import Measurement
from eqr_kernels.training.trainer import Progress


@dataclass
class Report(Progress):
    """Progress, and how well it uses the machine."""

    operations_per_second: float  # of the training steps' matrix products, all processes together
    share_of_gemm: float  # of the rate of plain matrix products, as measured at the start of the run


class Log(Protocol):
    def __call__(self, report: Report) -> None:
        """Takes one report."""

    def evaluated(self, step: int, measurements: Sequence[Measurement]) -> None:
        """Takes what the averaged weights of a step measure."""


class TensorBoardLog:
    """Scalars for TensorBoard.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"--tensorboard needs tensorboard: pip install 'eqr_kernels[train]' ({error})") from error
        self.writer = SummaryWriter(str(folder))

    def __call__(self, report: Report) -> None:
        for name, value in dataclasses.asdict(report).items():
            if name != "step":
                self.writer.add_scalar(f"train/{name}", value, report.step)
        self.writer.flush()

    def evaluated(self, step: int, measurements: Sequence[Measurement]) -> None:
        for m in measurements:
            self.writer.add_scalar(f"evaluation/{m.clues}/{m.source}/loss", m.loss, step)
            for depth, share in m.exact.items():
                self.writer.add_scalar(f"evaluation/{m.clues}/{m.source}/exact_{depth}", share, step)
        self.writer.flush()
