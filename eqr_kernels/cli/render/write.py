"""The files of a curve report: each picture as PNG and SVG, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from eqr_kernels.atomic import atomic_write
from eqr_kernels.cli.render import summary
from eqr_kernels.cli.render.figures import PICTURES, NoData, Picture, save
from eqr_kernels.cli.render.style import INSTALL
from eqr_kernels.cli.render.tables import tables

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport

PAGE = "curve.html"
_TEMPLATE = "curve.html.jinja"
_KINDS = ("png", "svg")


def write_report(report: CurveReport, folder: Path) -> list[Path]:
    """Writes the pictures and the page of a curve report.

    The same report gives the same bytes with the same version of matplotlib. Everything is drawn before the first file
    is written, and each file is written whole or not at all. A picture that has no data is left out; the page says
    why, and its files of an earlier report are removed from the folder.

    Args:
        report: what `eqr curve` measured.
        folder: where to write; made if it is not there.

    Returns:
        The files, pictures first, `curve.html` last.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
        NotADirectoryError: `folder` is a file.
        ValueError: the points do not all cost the same money a second.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder {folder} is a file; name a folder, which is made if it is not there")
    files: dict[str, bytes] = {}
    left_out: list[tuple[Picture, str]] = []
    for picture in PICTURES:
        try:
            figure = picture.draw(report)
        except NoData as reason:
            left_out.append((picture, str(reason)))
            continue
        files |= {f"{picture.stem}.{kind}": save(figure, kind) for kind in _KINDS}
    drawn = [(picture, files[f"{picture.stem}.svg"]) for picture in PICTURES if f"{picture.stem}.svg" in files]
    files[PAGE] = page(report, drawn, left_out).encode()
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, files, [f"{picture.stem}.{kind}" for picture, _ in left_out for kind in _KINDS])
    return [folder / name for name in files]


def _write(folder: Path, files: dict[str, bytes], stale: Sequence[str]) -> None:
    for name, data in files.items():
        atomic_write(folder / name, data)
    for name in stale:
        (folder / name).unlink(missing_ok=True)


def page(
    report: CurveReport, drawn: Sequence[tuple[Picture, bytes]] = (), left_out: Sequence[tuple[Picture, str]] = ()
) -> str:
    """The HTML page, which loads nothing and runs no script.

    Args:
        report: what `eqr curve` measured.
        drawn: pictures with their SVG.
        left_out: pictures that have no data, and why.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"the page of a report needs jinja2: {INSTALL} ({error})") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((resources.files(__package__) / _TEMPLATE).read_text(encoding="utf-8"))
    shown = [
        {"title": picture.title, "caption": picture.caption, "svg": base64.b64encode(svg).decode()}
        for picture, svg in drawn
    ]
    return template.render(
        title=f"Depth, cost and accuracy of {report.model}",
        facts=summary.facts(report),
        cards=summary.cards(report),
        no_recommendation=summary.no_recommendation(report),
        pictures=shown,
        left_out=left_out,
        tables=tables(report),
        explanations=summary.explanations(report),
        command=report.reproduce["command"],
        reproduction=summary.reproduction(report),
    )
