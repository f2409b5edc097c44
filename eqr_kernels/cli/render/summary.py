"""What stands at the top of a curve report, and how its numbers come about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eqr_kernels.cli.render import wording as say
from eqr_kernels.cli.render.reading import (
    SECONDS,
    Point,
    Report,
    count,
    index_at,
    look,
    number,
    points,
    rows,
    seconds_field,
    seconds_unit,
)


@dataclass(frozen=True)
class Card:
    """A point that the report singles out, and how to run it."""

    title: str
    point: str
    facts: str
    call: str
    note: str = ""


def facts(report: Report) -> list[tuple[str, str]]:
    """Names and values of what was measured and on what; without those that are not known."""
    settings = look(report, "settings")
    groups = look(report, "puzzles", "groups")
    number_of = say.whole(count(look(report, "puzzles", "count")))
    kinds = ", ".join(f"{str(name).replace('_', ' ')} {n}" for name, n in (groups or {}).items() if n is not None)
    file = look(report, "puzzles", "file")
    puzzles = ", ".join(filter(None, (number_of, "" if file is None else f"from {file}", kinds)))
    sizes = [f"{name} {size}" for name in ("depth", "breadth") if (size := look(settings, name)) is not None]
    backend = [str(part) for part in (look(report, "backend"), look(report, "backend_reason")) if part]
    told = {
        "model": look(report, "model"),
        "task": look(report, "task"),
        "device": look(report, "device"),
        "backend": ": ".join(backend),
        "precision": look(settings, "precision"),
        "puzzles": puzzles,
        "run to": ", ".join(sizes),
        "points": len(rows(report, "points")) or None,
        "price": _price(report),
        "measured in": (seconds := number(look(report, "seconds"))) and f"{say.significant(seconds)} s",
    }
    return [(name, str(value)) for name, value in told.items() if value]


def _price(report: Report) -> str:
    per_hour = number(look(report, "settings", "price", "per_hour"))
    return "" if per_hour is None else f"{per_hour:g} {look(report, 'settings', 'price', 'currency') or ''} an hour"


def cards(report: Report) -> list[Card]:
    """The recommendation, the best point, the bend and the knee; those that there are, each point once."""
    within = number(look(report, "bend", "cheapest_within", "points"))
    near = "cheapest near the best" if within is None else f"cheapest within {within:g} points of the best"
    recommended = index_at(report, "recommendation", "index")
    reason = str(look(report, "recommendation", "reason") or "")
    wanted = [
        ("recommended", recommended, reason),
        ("best", index_at(report, "bend", "best"), ""),
        (f"bend: {near}", index_at(report, "bend", "cheapest_within", "index"), ""),
        ("knee", index_at(report, "bend", "knee"), "from here on the next factor of cost starts to buy least"),
    ]
    everything, made = points(report), []
    for index in dict.fromkeys(index for _, index, _ in wanted if index is not None):
        p = everything[index]
        title = _sentence("; ".join(name for name, at, _ in wanted if at == index))
        notes = [_sentence(note) for _, at, note in wanted if at == index and note]
        told = look(report, "recommendation", "arguments") if index == recommended else None
        made.append(Card(title, p.name, _facts(report, p), _call(str(told or say.arguments(p))), ". ".join(notes)))
    return made


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(report: Report, p: Point) -> str:
    interval = say.interval(p.low, p.high)
    currency = look(report, "settings", "price", "currency")
    parts = [
        say.percent(p.share) and f"{say.percent(p.share)} right" + (f" ({interval})" if interval else ""),
        say.significant(p.nfe) and f"{say.significant(p.nfe)} NFE",
        say.significant(p.p50) and f"{say.significant(p.p50)} ms (p50)",
        say.significant(p.seconds) and f"{say.significant(p.seconds)} {seconds_unit(report)} a query",
        say.money(p.money, currency) and f"{say.money(p.money, currency)} for 1000 puzzles",
    ]
    return ", ".join(filter(None, parts))


def _call(arguments: str) -> str:
    return f"model.solve(tokens, {arguments})" if arguments else ""


def no_recommendation(report: Report) -> str:
    """What to say where nothing is recommended; "" where something is."""
    if index_at(report, "recommendation", "index") is not None:
        return ""
    reason = look(report, "recommendation", "reason")
    return f"Nothing is recommended{f': {reason}' if reason else ' in this report.'}"


def explanations(report: Report) -> list[tuple[str, str]]:
    """How each kind of number comes about: a heading and a paragraph."""
    return [
        (
            "Accuracy",
            "A puzzle counts as right when every token of its answer is. One run of all trajectories to the greatest "
            "depth and breadth records what each shallower and narrower point answers, so that all points see the same "
            "puzzles and the same random starts. Intervals are Wilson's at 95 %.",
        ),
        (
            "Outer steps and layers",
            "NFE is the mean number of outer steps that a puzzle costs, all its trajectories together, until the "
            f"policy stops. Layer equivalents are block applications{_layers(report)}.",
        ),
        (
            "Latency",
            "One query at a time takes an overhead and a time for each NFE; both are measured for each breadth, and a "
            "point's latency is computed from them and each puzzle's NFE. The percentiles are therefore over puzzles.",
        ),
        ("Throughput and cost", _cost(report)),
        ("Energy", _energy(look(report, "unit_costs", "energy"))),
        (
            "Memory",
            "The peak of a solve above what the process held before it, measured at some depths and breadths. A cell "
            "of the front is filled only where exactly that depth and breadth was measured.",
        ),
        (
            "The front and its bend",
            "A point is on the front when no other is as accurate for less, or more accurate for as much. The bend is "
            "the cheapest point whose accuracy is close to the best; the knee is where the next factor of cost starts "
            "to buy least.",
        ),
        (
            "Points that were run",
            "All points but these are computed from the one run and the unit costs. These were run as a user would run "
            "them, and the table shows how far the computation is off.",
        ),
        (
            "Residual",
            "The residual is the size of the last change of the latent state over the size of the state. A puzzle has "
            "settled when its residual is at most the tolerance. AUROC counts ties as a half.",
        ),
    ]


def _layers(report: Report) -> str:
    each = number(look(report, "layers_per_step"))
    return "" if each is None else f", {each:g} an outer step"


def _cost(report: Report) -> str:
    trajectories = count(look(report, "unit_costs", "saturation", "trajectories"))
    many = "so many trajectories" if trajectories is None else f"{trajectories:,} trajectories"
    field = seconds_field(report)
    unit = "the seconds" if field is None else f"the {SECONDS[field]}"
    price = _price(report)
    money = "No price was given, so there are no costs in money."
    if price:
        money = f"Costs in money are the wall time at {price}, for the whole machine."
    return (
        f"A call of {many} stands for a device that is saturated. Throughput and {unit} of a query follow from the "
        f"time for each NFE there and the point's NFE. {money}"
    )


def _energy(energy: Any) -> str:
    if energy is None:
        return "This device gave no reading of its energy, so there are no joules."
    source = look(energy, "source")
    return f"Joules are NFE times the energy for each NFE{'' if source is None else f', read from {source}'}."


def reproduction(report: Report) -> list[tuple[str, str]]:
    """What the reproducing command stands on: digests, machine, versions."""
    told = []
    for name, value in (look(report, "reproduce") or {}).items():
        if name == "command" or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{part} {version}" for part, version in value.items() if version is not None)
        told.append((name.replace("_", " "), str(value)))
    return told
