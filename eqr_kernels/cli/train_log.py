"""The reports of `eqr train` on stdout, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from eqr_kernels.training.evaluation import ALL, Measurement
from eqr_kernels.training.logs import Report


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
        """Exact accuracy by depth: as published by source, and of all with clues revealed."""

        def one(m: Measurement) -> str:
            name = f"{m.clues} clues" if m.clues != "published" else m.source
            return f"{name} " + "/".join(f"{100 * share:.1f}" for share in m.exact.values()) + f" % (loss {m.loss:.3f})"

        shown = [m for m in measurements if m.clues == "published" or m.source == ALL]
        depths = "/".join(map(str, shown[0].exact))
        print(f"step {step:>7,}  exact at depth {depths}: " + ", ".join(map(one, shown)), flush=True)


class JsonLog:
    """A JSON object on a line for each report."""

    def __call__(self, report: Report) -> None:
        print(json.dumps(dataclasses.asdict(report)), flush=True)

    def evaluated(self, step: int, measurements: Sequence[Measurement]) -> None:
        print(json.dumps({"step": step, "evaluation": [dataclasses.asdict(m) for m in measurements]}), flush=True)
