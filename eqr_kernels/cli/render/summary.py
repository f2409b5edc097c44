"""What stands at the top of a curve report, and how its numbers come about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eqr_kernels.cli.render import wording

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport
    from eqr_kernels.studies.points import Point


@dataclass(frozen=True)
class Card:
    """A point that the report singles out, and how to run it."""

    title: str
    point: str
    facts: str
    call: str
    note: str = ""


def facts(report: CurveReport) -> list[tuple[str, str]]:
    """Names and values of what was measured and on what; without those that are not known."""
    settings, puzzles = report.settings, report.puzzles
    kinds = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in puzzles.groups.items())
    source = "" if puzzles.file is None else f"from {puzzles.file}"
    known = {
        "model": report.model,
        "task": report.task,
        "device": report.device,
        "backend": ": ".join(filter(None, (report.backend, report.backend_reason))),
        "precision": settings.precision,
        "puzzles": ", ".join(filter(None, (f"{puzzles.count:,}", source, kinds))),
        "run to": f"depth {settings.depth}, breadth {settings.breadth}{wording.symmetries(report)}",
        "points": f"{len(report.points)}",
        "price": _price(report),
        "measured in": f"{wording.significant(report.seconds)} s" if report.seconds else "",
    }
    return [(name, value) for name, value in known.items() if value]


def _price(report: CurveReport) -> str:
    price = report.settings.price
    return f"{price.per_hour:g} {price.currency} an hour" if price else ""


def cards(report: CurveReport) -> list[Card]:
    """The recommendation, the best point, the bend and the knee; those that there are, each point once."""
    bend, recommendation = report.bend, report.recommendation
    wanted = [
        (
            "recommended",
            recommendation.index if recommendation else None,
            recommendation.reason if recommendation else "",
        ),
        ("best", bend.best, ""),
        (f"bend: cheapest within {bend.within_points:g} points of the best", bend.cheapest_within, ""),
        ("knee", bend.knee, "from here on the next factor of cost begins to buy less"),
    ]
    made = []
    for index in dict.fromkeys(index for _, index, _ in wanted if index is not None):
        p = report.points[index]
        title = _sentence("; ".join(name for name, at, _ in wanted if at == index))
        notes = [_sentence(note) for _, at, note in wanted if at == index and note]
        given = recommendation.arguments if recommendation and index == recommendation.index else None
        call = wording.call(report, p.policy, given)
        made.append(Card(title, wording.setting(p.policy), _facts(report, p), call, ". ".join(notes)))
    return made


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(report: CurveReport, p: Point) -> str:
    parts = [
        f"{wording.percent(p.accuracy.share)} right ({wording.interval(p.accuracy.interval)})",
        f"{wording.significant(p.nfe)} NFE",
        f"{wording.significant(p.latency_ms[0])} ms (p50)",
        f"{wording.significant(p.unit_seconds)} {wording.unit_seconds(report)} a query",
    ]
    if p.cost_per_1000 is not None:
        parts.append(f"{wording.significant(p.cost_per_1000)} {wording.currency(report)} for 1000 puzzles")
    return ", ".join(parts)


def no_recommendation(report: CurveReport) -> str:
    """What to say where nothing is recommended; "" where something is."""
    recommendation = report.recommendation
    if recommendation is None:
        return "Nothing is recommended in this report."
    return f"Nothing is recommended: {recommendation.reason}" if recommendation.index is None else ""


def explanations(report: CurveReport) -> list[tuple[str, str]]:
    """How each kind of number comes about: a heading and a paragraph."""
    return [
        (
            "Accuracy",
            "A puzzle counts as right when every token of its answer is. One run of all trajectories to the greatest "
            "depth and breadth records what each shallower and narrower point answers, so that all points see the same "
            "puzzles and the same starts. Intervals are Wilson's at 95 %.",
        ),
        (
            "Outer steps and layers",
            "NFE is the mean number of outer steps that a puzzle costs, all its trajectories together, until the "
            f"policy stops. Layer equivalents are block applications, {report.layers_per_step} an outer step. "
            f"{wording.recorded(report)}".rstrip(),
        ),
        (
            "Latency",
            "One query at a time takes an overhead and a time for each NFE; both are measured for each breadth, and a "
            "point's latency is computed from them and each puzzle's NFE. The percentiles are therefore over puzzles."
            + (" A race runs one view after the other, each a query of breadth 1." if report.settings.views else ""),
        ),
        ("Throughput and cost", _cost(report)),
        ("Energy", _energy(report)),
        (
            "Memory",
            "The peak of a solve above what the process held before it, measured at some depths and breadths. A cell "
            "of the front is filled only where exactly that depth and breadth was measured.",
        ),
        (
            "The front and its bend",
            "A point is on the front when no other is as accurate for less, or more accurate for as much. The bend is "
            "the cheapest point whose accuracy is close to the best; the knee is where the next factor of cost "
            "begins to buy less.",
        ),
        (
            "Points that were run",
            "All points but these are computed from the one run and the unit costs. These were run as a user would run "
            "them, and the table shows how far the computation is off.",
        ),
        (
            "Residual",
            "The residual is the size of the last change of the latent state over the size of the state. A puzzle "
            "meets the tolerance when its residual is at most that, whether or not its answer is right. AUROC counts "
            "ties as a half.",
        ),
    ]


def _cost(report: CurveReport) -> str:
    unit, price = wording.unit_seconds(report), _price(report)
    money = "No price was given, so there are no costs in money."
    if price:
        money = f"Costs in money are the wall time at {price}, for the whole machine."
    return (
        f"A call of {report.unit_costs.trajectories:,} trajectories stands for a device that is saturated. Throughput "
        f"and the {unit} of a query follow from the time for each NFE there and the point's NFE. {money}"
    )


def _energy(report: CurveReport) -> str:
    energy = report.unit_costs.energy
    if energy is None:
        return "This device gave no reading of its energy, so there are no joules."
    return f"Joules are NFE times the energy for each NFE, read from {energy.source}."


def reproduction(report: CurveReport) -> list[tuple[str, str]]:
    """What the reproducing command stands on: digests, machine, versions."""
    known = []
    for name, value in report.reproduce.items():
        if name == "command" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{part} {version}" for part, version in value.items() if version is not None)
        known.append((name.replace("_", " "), str(value)))
    return known
