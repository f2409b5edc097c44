"""Reading what the benchmark suites and `eqr curve` write, and telling changes from noise; imports no torch."""

from eqr_kernels.benchmarking.comparison import Comparison, Item, Settings, compare
from eqr_kernels.benchmarking.measures import Measure, Row, Run
from eqr_kernels.benchmarking.reading import NotResults, pairs, read

__all__ = ["Comparison", "Item", "Measure", "NotResults", "Row", "Run", "Settings", "compare", "pairs", "read"]
