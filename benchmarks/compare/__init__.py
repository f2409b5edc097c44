"""Reading what the benchmark suites and `eqr curve` write, and telling changes from noise; imports no torch."""

from benchmarks.compare.comparison import Comparison, Item, Settings, compare
from benchmarks.compare.measures import Measure, Row, Run
from benchmarks.compare.reading import NotResults, pairs, read

__all__ = ["Comparison", "Item", "Measure", "NotResults", "Row", "Run", "Settings", "compare", "pairs", "read"]
