"""What a run is to do: one file in its folder, which the rows' processes read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.ablation.rows import Choice, parse_row
from benchmarks.studies.ablation.settings import EvaluationSettings, TrainingSettings
from eqr_kernels.atomic import atomic_write

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Settings, rows and where the puzzles are.

    Attributes:
        minutes: that the budget was measured for, None where it was given.
        threads: of each process.
    """

    training: TrainingSettings
    evaluation: EvaluationSettings
    rows: tuple[Choice, ...]
    train_file: Path
    dev_file: Path
    minutes: float | None
    threads: int

    def write(self, runs: Path) -> None:
        content = {
            "training": self.training.to_json(),
            "evaluation": self.evaluation.to_json(),
            "rows": [choice.key for choice in self.rows],
            "train_file": str(self.train_file),
            "dev_file": str(self.dev_file),
            "minutes": self.minutes,
            "threads": self.threads,
        }
        runs.mkdir(parents=True, exist_ok=True)
        atomic_write(runs / FILE, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, runs: Path) -> Plan:
        """The plan in `runs`.

        Raises:
            FileNotFoundError: there is none.
        """
        content: dict[str, Any] = json.loads((runs / FILE).read_text())
        return cls(
            TrainingSettings.from_json(content["training"]),
            EvaluationSettings.from_json(content["evaluation"]),
            tuple(parse_row(key) for key in content["rows"]),
            Path(content["train_file"]),
            Path(content["dev_file"]),
            content["minutes"],
            content["threads"],
        )


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
