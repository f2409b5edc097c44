"""The pictures of a curve report, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eqr_kernels.cli.render.cost_figures import accuracy_against_cost, latency_against_breadth, memory_against_depth
from eqr_kernels.cli.render.style import NoData, save
from eqr_kernels.cli.render.trajectory_figures import residual_and_correctness, steps_to_convergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eqr_kernels.studies.curve_report import CurveReport

__all__ = [
    "PICTURES",
    "NoData",
    "Picture",
    "accuracy_against_cost",
    "latency_against_breadth",
    "memory_against_depth",
    "residual_and_correctness",
    "save",
    "steps_to_convergence",
]


@dataclass(frozen=True)
class Picture:
    """A picture: the stem of its files, what it shows, and the function that draws it (raises `NoData`)."""

    stem: str
    title: str
    caption: str
    draw: Callable[[CurveReport], Figure]


PICTURES = (
    Picture(
        "accuracy_cost",
        "Accuracy against cost",
        "Every policy, depth, breadth and tolerance that was asked for. The line is the Pareto front: no other point "
        "is both cheaper and more accurate. Bars are Wilson's 95 % intervals; sizes in labels are depth × breadth.",
        accuracy_against_cost,
    ),
    Picture(
        "residual",
        "Residual and correctness",
        "Trajectories by their last residual. AUROC is how often, of a right and a wrong trajectory, the right one has "
        "the lower residual.",
        residual_and_correctness,
    ),
    Picture(
        "convergence",
        "Steps to convergence",
        "How many outer steps the puzzles of each group need until their residual meets the tolerance, and whether "
        "their answer is right then.",
        steps_to_convergence,
    ),
    Picture(
        "latency",
        "Latency against breadth",
        "One query at a time. Lines are computed from the unit costs for trajectories that all run to the depth; dots "
        "are points that were run for real, most of which stop earlier.",
        latency_against_breadth,
    ),
    Picture(
        "memory",
        "Memory against depth",
        "The peak of a solve above what the process held before it.",
        memory_against_depth,
    ),
)
