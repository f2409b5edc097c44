"""What a training run tells of itself as it goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eqr_kernels.training.evaluation import Measurement, log_line
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


class TextLog:
    """A line for each report."""

    def __call__(self, report: Report) -> None:
        r = report
        print(
            f"step {r.step:>7,}  loss {r.loss:.4f}  exact {100 * r.exact:5.1f} %  steps {r.steps:4.1f}  "
            f"residual {r.residual:.4f}  lr {r.lr:.2e}  {r.samples_per_second:6.1f} samples/s  "
            f"{r.operations_per_second / 1e12:.2f} TFLOP/s  {100 * r.share_of_gemm:.0f} % of GEMM",
            flush=True,
        )

    def evaluated(self, step: int, measurements: Sequence[Measurement]) -> None:
        print(log_line(step, measurements), flush=True)


class JsonLog:
    """A JSON object on a line for each report."""

    def __call__(self, report: Report) -> None:
        print(json.dumps(dataclasses.asdict(report)), flush=True)

    def evaluated(self, step: int, measurements: Sequence[Measurement]) -> None:
        print(json.dumps({"step": step, "evaluation": [dataclasses.asdict(m) for m in measurements]}), flush=True)


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
