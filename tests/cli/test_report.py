"""The pictures and the page of a curve report: whole, self-contained, the same each time, and honest about gaps."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqr_kernels.cli.render import PICTURES, NoData, page, write_report
from eqr_kernels.cli.render import wording as say
from eqr_kernels.cli.render.style import save, spread
from eqr_kernels.studies.curve_report import SCHEMA, CurveReport, GroupSteps, Puzzles, ReportError, TurnSettings
from eqr_kernels.studies.replay import POLICIES_WITH_TOLERANCE, RACES, Policy
from tests.support.curve_report import BREADTHS, DEPTHS, make_report
from tests.support.environment import REPOSITORY

REPORT = make_report()
STEMS = [picture.stem for picture in PICTURES]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements of a page; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, attrs in self.elements for name, value in attrs.items() if name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report") / "made" / "here"
    files = write_report(REPORT, where)
    assert [file.name for file in files] == [f"{s}.{kind}" for s in STEMS for kind in ("png", "svg")] + ["curve.html"]
    assert sorted(files) == sorted(where.iterdir())
    return where


@pytest.mark.slow
def test_files_are_valid(folder: Path) -> None:
    for stem in STEMS:
        png = (folder / f"{stem}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", png[16:24])
        assert width == 1200 and 400 < height < 1200
        assert b"matplotlib" not in png
        svg = ET.fromstring((folder / f"{stem}.svg").read_bytes())
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert not [e for e in svg.iter() if "date" in e.tag]
    Page((folder / "curve.html").read_text())


def test_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "curve.html").read_text()
    parsed = Page(text)
    assert not [tag for tag, _ in parsed.elements if tag in ("script", "iframe", "object", "embed", "base", "form")]
    references = parsed.attributes("src", "href", "srcset", "action", "data", "poster", "background")
    assert references and all(value.startswith(("data:", "#")) for value in references)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and not re.search(r"url\(|@import|https?:", style[1])
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    anchors = {value for value in parsed.attributes("id")}
    assert {value[1:] for value in references if value.startswith("#")} <= anchors
    pictures = [value.partition("base64,")[2] for value in parsed.attributes("src")]
    assert [base64.b64decode(data) for data in pictures] == [(folder / f"{s}.svg").read_bytes() for s in STEMS]
    for stem in STEMS:
        svg = ET.fromstring((folder / f"{stem}.svg").read_bytes())
        links = [value for e in svg.iter() for name, value in e.attrib.items() if name.endswith("href")]
        assert all(value.startswith(("#", "data:image/png")) for value in links)


def changed(report: CurveReport = REPORT, **changes: Any) -> CurveReport:
    """The report with other values at paths, as in reproduce__command="..."."""
    for path, value in changes.items():
        name, _, rest = path.partition("__")
        if rest:
            value = changed(getattr(report, name), **{rest: value})
        report = dataclasses.replace(report, **{name: value})
    return report


BARE = changed(
    unit_costs__memory=(),
    bend__knee=None,
    checked=(),
    early_exit=None,
    settling=None,
    residuals__auroc=None,
    recommendation=None,
    settings__price=None,
    settings__card_tol=None,
    puzzles__file=None,
    points=tuple(dataclasses.replace(p, cost_per_1000=None, settled=None) for p in REPORT.points),
)
"""Nothing in it that may be missing."""


def test_front_table() -> None:
    table = Page(page(REPORT)).tables[0]
    head, body = table[0], table[1:]
    assert len(body) == len({*REPORT.bend.front, *say.marks(REPORT)})
    column = {name: k for k, name in enumerate(head)}
    best = REPORT.points[REPORT.bend.best]
    row, (low, high) = body[-1], best.accuracy.interval
    assert row[0] == "within 0.5 points, best" and row[1] == "race"
    assert row[column["accuracy"]] == f"{100 * best.accuracy.share:.1f} %"
    assert row[column["95 % interval"]] == f"{100 * low:.1f} to {100 * high:.1f} %"
    assert float(row[column["layer equivalents"]].replace(",", "")) == pytest.approx(8 * best.nfe, rel=5e-3)
    assert float(row[column["core-seconds"]]) == pytest.approx(best.unit_seconds, rel=5e-3)
    assert float(row[column["p95, ms"]]) == pytest.approx(best.latency_ms[1], rel=5e-3)
    assert float(row[column["USD per 1000"]]) == pytest.approx(best.cost_per_1000, rel=5e-3)
    # Memory was measured at breadths 1, 8 and 32 and depths 1, 4, 16 and 64 alone; energy on no CPU.
    for cells in body:
        measured = cells[column["breadth"]] in ("1", "8", "32") and cells[column["depth"]] in ("1", "4", "16", "64")
        assert bool(cells[column["memory, MiB"]]) == measured
        assert cells[column["joules"]] == ""
    assert {bool(cells[column["memory, MiB"]]) for cells in body} == {True, False}


def test_summary_and_other_tables() -> None:
    parsed = Page(page(REPORT))
    assert f"model.solve(tokens, {REPORT.recommendation.arguments})" in parsed.text
    best = REPORT.points[REPORT.bend.best].policy
    call = f'depth={best.depth}, breadth={best.breadth}, halt="residual", tol={best.tol:g}, select="first"'
    assert f"model.solve(tokens, {call})" in parsed.text
    assert REPORT.reproduce["command"] in parsed.text
    checked = parsed.tables[1][1:]
    assert len(checked) == len(REPORT.checked) and {row[12] for row in checked} == {"-3.8 %"}
    memory = parsed.tables[3]
    assert memory[0] == ["depth", "breadth 1", "breadth 8", "breadth 32"]
    assert [row[0] for row in memory[1:]] == ["1", "4", "16", "64"]


def test_gpu_without_a_price() -> None:
    report = make_report(gpu=True, price=False)
    parsed = Page(page(report))
    head, row = parsed.tables[0][0], parsed.tables[0][-1]
    assert "GPU-seconds" in head and row[head.index("money per 1000")] == "" and row[head.index("joules")] != ""
    assert "No price was given" in parsed.text and "read from NVML" in parsed.text
    figure = PICTURES[0].draw(report)
    assert figure.axes[0].get_xlabel().startswith("GPU-seconds") and not figure.axes[0].child_axes


def test_a_backend_that_records_few_depths_is_named() -> None:
    report = changed(make_report(gpu=True), settings__depth=128, settings__recorded_depths=tuple(range(2, 129, 2)))
    assert "cuda backend records 64 depths of a run, so halting is looked at after so many of the 128" in page(report)
    assert "records" not in say.recorded(REPORT)


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        ("fixed", 'depth=64, breadth=8, halt="none"'),
        ("q", 'depth=64, breadth=8, halt="q"'),
        ("residual", 'depth=64, breadth=8, halt="residual", tol=0.028'),
        ("residual+q", 'depth=64, breadth=8, halt="residual+q", tol=0.028'),
        ("race", 'depth=64, breadth=8, halt="residual", tol=0.028, select="first"'),
        ("race+q", 'depth=64, breadth=8, halt="residual+q", tol=0.028, select="first"'),
    ],
)
def test_calls(policy: str, want: str) -> None:
    tol = 0.028 if policy in POLICIES_WITH_TOLERANCE else None
    assert Policy(policy, 64, 8, tol, "first" if policy in RACES else "residual").call() == want


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (dict(), "model.solve(tokens, depth=9, breadth=2, ...)"),
        (
            dict(turns=TurnSettings(4, 64)),
            "model.solve(tokens, turns=ek.Turns(4, task.views, 64), depth=9, breadth=2, ...)",
        ),
        (
            dict(turns=TurnSettings(4, 8), seed=3),
            "model.solve(tokens, turns=ek.Turns(4, lambda x, n: task.views(x, n, seed=3), 8), depth=9, breadth=2, ..., "
            "seed=3)",
        ),
        (dict(views=True), "ek.solve_views(model, task.views(inputs, 2), depth=9, ...)"),
        (
            dict(views=True, turns=TurnSettings(4, 64), seed=3),
            "ek.solve_views(model, task.views(inputs, 2, seed=3), "
            "turns=ek.Turns(4, lambda x, n: task.views(x, n, seed=3), 64), depth=9, ..., seed=3)",
        ),
    ],
)
def test_what_to_type_for_a_point(settings: dict[str, Any], want: str) -> None:
    report = changed(**{f"settings__{name}": value for name, value in settings.items()})
    assert say.call(report, Policy("fixed", 9, 2)) == want.replace("...", 'halt="none"')


@pytest.mark.parametrize(
    ("value", "want"),
    [(None, ""), (0, "0"), (0.0123456, "0.0123"), (12.3456, "12.3"), (12345.6, "12,346"), (1.234e-7, "1.23e-07")],
)
def test_significant(value: float | None, want: str) -> None:
    assert say.significant(value) == want


@pytest.mark.slow
def test_values_are_escaped() -> None:
    nasty = '<script>alert("1")</script>&$\\frac{'
    report = changed(
        model=nasty,
        device=nasty,
        backend_reason=nasty,
        reproduce={"command": nasty, "versions": {nasty: nasty}},
        puzzles=Puzzles(3, 3, nasty, {nasty: 3}, None, None),
        settling__groups=(GroupSteps(nasty, 3, (1, 1) + (0,) * 62, (0,) * 64), *REPORT.settling.groups[1:]),
        recommendation__arguments=nasty,
        recommendation__reason=nasty,
        settings__price__currency=nasty,
        checked=(dataclasses.replace(REPORT.checked[0], why=(nasty,)),),
    )
    text = page(report)
    parsed = Page(text)
    assert "<script" not in text and "script" not in [tag for tag, _ in parsed.elements]
    assert parsed.text.count(nasty) >= 8
    for picture in PICTURES:  # and no mathematics starts at a dollar sign
        save(picture.draw(report), "png")


@pytest.mark.slow
def test_what_may_be_missing_is_left_out(tmp_path: Path) -> None:
    for name in ("memory.png", "memory.svg", "mine.png"):
        (tmp_path / name).touch()
    files = write_report(BARE, tmp_path)
    assert [file.name for file in files if file.suffix == ".png"] == [
        "accuracy_cost.png",
        "residual.png",
        "latency.png",
    ]
    # A picture of an earlier report would be taken for one of this.
    assert not (tmp_path / "memory.png").exists() and (tmp_path / "mine.png").exists()
    text = Page((tmp_path / "curve.html").read_text()).text
    assert "None" not in text and "Nothing is recommended in this report." in text
    for picture in PICTURES:
        if f"{picture.stem}.svg" not in [file.name for file in files]:
            with pytest.raises(NoData) as reason:
                picture.draw(BARE)
            assert f"{picture.title} is left out: {reason.value}." in text


# the report itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [REPORT, BARE, make_report(gpu=True, seed=5)], ids=["plain", "bare", "gpu"])
def test_a_report_is_read_back_as_it_was(report: CurveReport) -> None:
    text = report.to_json()
    assert CurveReport.from_json(text) == report and CurveReport.from_json(text.encode()).to_json() == text
    body = json.loads(text)
    assert body["command"] == "curve" and body["schema"] == SCHEMA
    assert len(text.splitlines()) < len(report.points) + 100


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 1, "from `eqr curve`, schema 4, got command 'curve', schema 1; write it again with `eqr curve`"),
        (("command",), "eval", "got command 'eval'"),
        (("model",), ..., "the report lacks model; write it again"),
        (("quantisation",), None, "the report has the unknown quantisation"),
        (("points", 3, "nfe"), ..., r"points\[3\] lacks nfe"),
        (("points", 3, "colour"), "red", r"points\[3\] has the unknown colour"),
        (("points", 0, "accuracy", "correct"), 1.5, r"points\[0\].accuracy.correct must be int, got 1.5"),
        (("points", 0, "latency_ms"), [1.0, 2.0], r"points\[0\].latency_ms must be .*float.* got \[1.0, 2.0\]"),
        (("points", 0, "policy", "name"), "ever", "a policy must be one of"),
        (("unit_costs",), None, "unit_costs must be an object, got None"),
        (("settings", "price"), 3, "settings.price must be an object, got 3"),
        (("seconds",), "long", "seconds must be float, got 'long'"),
        (("bend", "best"), 9999, "bend.best must be an index into the .* points, got 9999"),
        (("bend", "front"), [0, -1], "bend.front must be an index"),
        (("checked", 0, "index"), 9999, "checked.index must be an index"),
        (("recommendation", "index"), 9999, "recommendation.index must be an index"),
        (("residuals", "wrong_counts"), [1, 2, 3], "one log10_edges more than .* got 53, 52 and 3"),
    ],
)
def test_what_is_no_report_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    body: Any = json.loads(REPORT.to_json())
    place = body
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        CurveReport.from_json(json.dumps(body))


@pytest.mark.parametrize("text", ["{", "[]", "null", b"\xff"])
def test_what_is_no_json_object_is_no_report(text: str | bytes) -> None:
    with pytest.raises(ReportError, match="a report must be"):
        CurveReport.from_json(text)


@pytest.mark.slow
def test_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text(REPORT.to_json())
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: none\naxes.facecolor: red\n")
    code = """
from pathlib import Path
from eqr_kernels.cli.render import write_report
from eqr_kernels.studies.curve_report import CurveReport
write_report(CurveReport.from_json(Path("curve.json").read_text()), Path("again"))
"""
    changed = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(REPOSITORY), "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | changed, check=True, timeout=300)
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_missing_libraries_are_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}: pip install "eqr_kernels\[plot\]"'):
        write_report(REPORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_named_by_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for picture in PICTURES:
        with pytest.raises(ImportError, match=r'pip install "eqr_kernels\[plot\]"'):
            picture.draw(REPORT)


def test_import_is_light() -> None:
    code = (
        "import sys, eqr_kernels.cli.render\n"
        "print(*({'torch', 'numpy', 'matplotlib', 'jinja2', 'eqr_kernels.studies'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def uneven() -> CurveReport:
    first, *others = REPORT.points
    return changed(points=(dataclasses.replace(first, cost_per_1000=2 * first.cost_per_1000), *others))


def test_nothing_is_written_unless_all_can_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must all cost the same money a second"):
        write_report(uneven(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; name a folder"):
        write_report(REPORT, tmp_path / "file")


@given(st.lists(st.floats(-0.5, 1.5), max_size=4))
def test_spread(wanted: list[float]) -> None:
    wanted.sort()
    places = spread(wanted, 0.25)
    assert len(places) == len(wanted)
    assert all(0.125 - 1e-9 <= place <= 0.875 + 1e-9 for place in places)
    assert all(b - a >= 0.25 - 1e-9 for a, b in itertools.pairwise(places))
    if all(0.125 <= a <= 0.875 for a in wanted) and all(b - a >= 0.25 for a, b in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted)


def crowded() -> CurveReport:
    """Every mark on another point of the front, close to each other, and long names."""
    report = make_report(seed=3)
    a, b, c, d = report.bend.front[-4:]
    return changed(
        report,
        device="Intel(R) Xeon(R) Platinum 8592+ CPU @ 1.90GHz, avx512 bf16, 128 threads, " * 3,
        bend=dataclasses.replace(report.bend, best=d, cheapest_within=c, knee=a),
        recommendation__index=b,
    )


@pytest.mark.parametrize("picture", PICTURES, ids=STEMS)
@pytest.mark.parametrize("report", [REPORT, crowded(), make_report(gpu=True, seed=5)], ids=["plain", "crowded", "gpu"])
def test_text_does_not_overlap_and_is_inside(
    picture: Any, report: CurveReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.text import Text

    figure = picture.draw(report)
    drawn: dict[int, Text] = {}  # ticks beyond an axis' limits exist, but are not drawn
    draw = Text.draw

    def record(text: Text, *args: Any, **kwargs: Any) -> None:
        drawn[id(text)] = text
        draw(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", record)
    save(figure, "png")
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in drawn.values()
        if text.get_visible() and text.get_text().strip() and text.get_text() != figure.get_suptitle()
    ]
    assert len(boxes) > 10
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


def test_marks_share_a_label() -> None:
    best = REPORT.bend.best
    report = changed(bend__cheapest_within=best, bend__knee=best)
    assert say.marks(report)[best] == ["knee", "within 0.5 points", "best"]
    labels = [text.get_text() for text in PICTURES[0].draw(report).axes[0].texts]
    assert len([label for label in labels if "best" in label]) == 1


def test_pictures_show_the_numbers() -> None:
    drawn = {picture.stem: picture.draw(REPORT) for picture in PICTURES}
    cost = drawn["accuracy_cost"].axes[0]
    assert sum(len(c.get_offsets()) for c in cost.collections if hasattr(c, "get_sizes")) >= len(REPORT.points)
    memory = {line.get_label(): line.get_ydata() for line in drawn["memory"].axes[0].lines}
    assert set(memory) == {"breadth 1", "breadth 8", "breadth 32"}
    assert memory["breadth 8"][0] * 2**20 == pytest.approx(3_100_000 + 8 * 165_000 + 900)
    latency = {line.get_label(): line.get_ydata() for line in drawn["latency"].axes[0].lines}
    first = REPORT.unit_costs.latency[0]
    assert latency["fixed depth 64"][0] == pytest.approx(first.overhead_ms + 64 * first.ms_per_nfe)
    assert len(latency["fixed depth 64"]) == len(BREADTHS)
    assert "AUROC 0.991" in " ".join(text.get_text() for text in drawn["residual"].texts)
    steps, never = drawn["convergence"].axes[2:4]
    group = REPORT.settling.groups[1]
    assert 0 < group.settled < group.puzzles
    right, both = (patch.get_data() for patch in steps.patches[:2])
    assert len(right.values) == DEPTHS[-1] and right.values.sum() == pytest.approx(
        100 * sum(group.right) / group.puzzles
    )
    assert both.values.sum() == pytest.approx(100 * group.settled / group.puzzles)
    assert both.values.sum() > right.values.sum() > 0
    assert (both.baseline == right.values).all()
    assert never.patches[0].get_height() == pytest.approx(100 - both.values.sum())


def test_many_steps_share_bars() -> None:
    groups = (GroupSteps("g", 2002, (1,) * 1001, (0,) * 1001),)
    report = changed(settings__depth=1001, settling__groups=groups)
    figure = PICTURES[2].draw(report)
    stairs = figure.axes[0].patches[0].get_data()
    assert len(stairs.values) == 126 and stairs.edges[-1] == 1001.5
    assert stairs.values.sum() == pytest.approx(50) and "per 8 steps" in figure.get_supylabel()


def test_template_is_shipped() -> None:
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in data["eqr_kernels"] for path in (REPOSITORY / "eqr_kernels").glob(pattern)}
    templates = set((REPOSITORY / "eqr_kernels" / "cli" / "render").glob("*.jinja"))
    assert templates and templates <= shipped
    assert "eqr_kernels/cli/render *.jinja" in (REPOSITORY / "MANIFEST.in").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium on PATH, to open the page")
@pytest.mark.parametrize("width", [500, 1200])
def test_page_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    probe = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(image => image.naturalWidth > 0 && image.clientWidth <= 800);
  document.body.setAttribute("data-probe", JSON.stringify(
    {images, page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth}));
});
</script></body>"""
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", (folder / "curve.html").read_text())
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe))
    common = (
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},3000",
        "--virtual-time-budget=3000",
        "--enable-logging=stderr",
    )

    def browse(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*common, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done

    browse(f"--screenshot={tmp_path / 'page.png'}", (folder / "curve.html").as_uri())
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    body = next(
        attrs
        for tag, attrs in Page(browse("--dump-dom", (tmp_path / "probe.html").as_uri()).stdout).elements
        if tag == "body"
    )
    seen = json.loads(body["data-probe"] or "")
    assert seen["images"] == [True] * len(STEMS)
    # Wide tables scroll within themselves; the page does not.
    assert seen["page"] <= seen["window"] <= width
