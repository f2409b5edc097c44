"""`eqr curve`, end to end: what it writes, how it goes on, and what it says of wishes and files that make no sense."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import eqr_kernels as ek
from eqr_kernels import EqRConfig
from eqr_kernels.checkpoint import ModelCard
from eqr_kernels.cli.render import wording
from eqr_kernels.distributed.engines import Local
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.studies import costs
from eqr_kernels.studies.curve_report import CurveReport
from eqr_kernels.studies.replay import POLICIES
from eqr_kernels.studies.scoring import exact_match
from eqr_kernels.studies.store import Store
from eqr_kernels.tasks import sudoku, sudoku_generator
from tests.support.commands import TINY, eqr, make_copier
from tests.support.models import make_contractive

REAL_SECONDS = costs._seconds


@pytest.fixture(autouse=True)
def _invented_times(monkeypatch):
    """A solve takes as long as its outer steps say: timing takes seconds, and once is enough."""

    def invented(model, tokens, *, depth, breadth, **options):
        return 1e-3 + 1e-4 * depth * breadth * len(tokens)

    monkeypatch.setattr(costs, "_seconds", invented)


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch):
    """The pictures have tests of their own, and take seconds."""
    monkeypatch.setattr("eqr_kernels.cli.render.write_report", lambda report, folder: [folder / "curve.html"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "puzzles.csv"
    rows = ["source,question,answer,rating"]
    for name, seed in (("easy", 5), ("medium", 6)):
        part = sudoku_generator.generate(3, name, seed=seed)
        for question, answer in zip(part.inputs, part.labels, strict=True):
            rows.append(f"{name},{sudoku.decode(question)},{sudoku.decode(answer)},0")
    path.write_text("\n".join(rows) + "\n")
    return path


def curve(out: Path, *arguments: object, code: int = 0):
    result = eqr("curve", "--out", out, "--depth", 4, "--breadth", 2, "--quick", *arguments, "--no-progress", code=code)
    return result, CurveReport.from_json((out / "curve.json").read_text())


@pytest.mark.slow
def test_the_map_of_the_shipped_model(data, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_seconds", REAL_SECONDS)
    result, report = curve(tmp_path / "c", data, "--price", 0.5, "--currency", "EUR", "--target", 0.1)
    assert report.puzzles.groups == {"easy": 3, "medium": 3} and report.puzzles.count == 6
    assert report.settings.depths == (1, 2, 4) and report.settings.breadths == (1, 2)
    assert report.settings.recorded_depths is None
    points = report.points
    assert len({p.policy for p in points}) == len(points)
    assert {p.policy.name for p in points} == set(POLICIES)
    # What it recommends is what solve then does.
    recommended = report.recommendation
    chosen = points[recommended.index]
    arguments = eval(f"dict({recommended.arguments})")
    model = EquilibriumReasoner.from_pretrained(report.model)
    rows = [line.split(",") for line in data.read_text().splitlines()[1:]]
    inputs, labels = (np.stack([sudoku.encode(row[k]) for row in rows]) for k in (1, 2))
    real = model.solve(torch.from_numpy(inputs).long(), **arguments)
    assert int(exact_match(real.preds.numpy(), labels).sum()) == chosen.accuracy.correct
    assert chosen.accuracy.share >= 0.1
    assert f"model.solve(tokens, {recommended.arguments})" in result.stdout
    for p in points:
        assert p.cost_per_1000 == pytest.approx(1000 / p.throughput / 3600 * 0.5)
        assert p.unit_seconds == pytest.approx(torch.get_num_threads() / p.throughput)
        assert list(p.latency_ms) == sorted(p.latency_ms)
    front = [points[i].unit_seconds for i in report.bend.front]
    assert front == sorted(front) and report.bend.best == report.bend.front[-1]
    checked = [row.run for row in report.checked if points[row.index].policy.select != "first"]
    assert checked and all((r.correct, r.nfe) == (r.computed_correct, r.computed_nfe) for r in checked)
    assert report.settling.groups[0].puzzles == 3
    residuals = report.residuals
    assert sum(residuals.right_counts) == residuals.right
    assert sum(residuals.right_counts + residuals.wrong_counts) == residuals.trajectories == 12
    assert [row.breadth for row in report.early_exit.rows] == [1, 2]
    assert "curve" in report.reproduce["command"] and "--price 0.5" in report.reproduce["command"]


@pytest.mark.slow
@pytest.mark.parametrize("symmetries", [["--views"], ["--turn-every", 3], ["--views", "--turn-every", 3]], ids=str)
def test_the_map_of_symmetries_is_what_they_do(data, tmp_path, symmetries):
    result, report = curve(tmp_path / "c", data, *symmetries, "--seed", 3, "--target", 0.1)
    assert {p.policy.name for p in report.points} == set(POLICIES)
    assert all((r.run.correct, r.run.nfe) == (r.run.computed_correct, r.run.computed_nfe) for r in report.checked)
    recommended = report.recommendation
    call = wording.call(report, report.points[recommended.index].policy, recommended.arguments)
    assert call in " ".join(result.stdout.split())
    rows = [line.split(",") for line in data.read_text().splitlines()[1:]]
    inputs, labels = (np.stack([sudoku.encode(row[k]) for row in rows]) for k in (1, 2))
    model, task = EquilibriumReasoner.from_pretrained(report.model), sudoku
    tokens = torch.from_numpy(inputs.astype(np.int64))
    real = eval(call, dict(ek=ek, model=model, task=task, inputs=inputs, tokens=tokens))
    assert int(exact_match(real.preds.numpy(), labels).sum()) == report.points[recommended.index].accuracy.correct
    same = ["--out", tmp_path / "c", "--depth", 4, "--breadth", 2, "--quick", "--seed", 3]
    refused = eqr("curve", data, *same, code=2)
    other = "views was True and is None" if "--views" in symmetries else "turn_every was 3 and is None"
    assert other in refused.stderr


@pytest.mark.slow
def test_json_is_the_file(data, tmp_path):
    result, report = curve(tmp_path / "c", data, "--limit", 2, "--json")
    assert CurveReport.from_json(result.stdout) == report


@pytest.mark.slow
def test_a_backend_that_records_few_depths_is_asked_for_no_more(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for backend in ("cpu.CpuBackend", "reference.ReferenceBackend"):
            patch.setattr(f"eqr_kernels.backends.{backend}.max_checkpoints", 6)
        result, few = curve(tmp_path / "few", data, "--depth", 12)
    assert few.settings.recorded_depths == (1, 2, 3, 4, 8, 12)
    assert "records 6 depths of a run, so halting is looked at after so many of the 12 steps" in result.stdout
    _, every = curve(tmp_path / "every", data, "--depth", 12)
    for rough, exact in zip(few.points, every.points, strict=True):
        if rough.policy.name == "fixed":
            assert (rough.policy, rough.accuracy, rough.nfe) == (exact.policy, exact.accuracy, exact.nfe)
        else:
            assert exact.nfe <= rough.nfe <= 2 * exact.nfe


@pytest.mark.slow
def test_the_same_command_runs_no_puzzle_again(data, tmp_path, monkeypatch):
    before = curve(tmp_path / "c", data)[1]
    saved = []
    monkeypatch.setattr(Store, "save", lambda self, start, part: saved.append(start))
    after = curve(tmp_path / "c", data, "--target", 0.01, code=0 if _any_right(before) else 1)[1]
    assert not saved
    assert [p.accuracy for p in after.points] == [p.accuracy for p in before.points]
    curve(tmp_path / "c", data, "--fresh")
    assert saved == [0]


def _any_right(report) -> bool:
    return any(p.accuracy.correct for p in report.points)


@pytest.mark.slow
def test_an_interruption_keeps_what_was_run_and_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr("eqr_kernels.studies.recording._FULL", {"cpu": 1, "cuda": 1})  # a puzzle at a time
    real, out = Store.save, tmp_path / "c"

    def interrupted(self, start, part):
        real(self, start, part)
        if start == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", interrupted)
    result = eqr("curve", data, "--out", out, "--depth", 2, "--breadth", 1, "--quick", code=130)
    assert "interrupted; 2 of 6 puzzles are kept in" in result.stderr and "goes on from there" in result.stderr
    assert not (out / "curve.json").exists() and len(list(out.glob("recording/part-*.npz"))) == 2
    ran = []

    def counted(self, start, part):
        ran.append(start)
        real(self, start, part)

    monkeypatch.setattr(Store, "save", counted)
    eqr("curve", data, "--out", out, "--depth", 2, "--breadth", 1, "--quick")
    assert ran == [2, 3, 4, 5] and (out / "curve.json").exists()


@pytest.mark.parametrize("turning", [[], ["--turn-every", 1]], ids=["still", "turned"])
def test_another_engine_records_what_is_not_there_yet(data, tmp_path, monkeypatch, turning):
    """Ray itself is in tests/distributed."""
    pytest.importorskip("pyarrow")
    sizes = ["--depth", 2, "--breadth", 1, "--quick", *turning]
    eqr("curve", data, "--out", tmp_path / "here", *sizes)
    monkeypatch.setattr("eqr_kernels.cli.engines.OnRay", lambda *_: Local())
    eqr("curve", data, "--out", tmp_path / "there", *sizes, "--engine", "ray")
    parts = sorted(path.name for path in (tmp_path / "here" / "recording").iterdir())
    assert len(parts) > 1
    for name in parts:
        here, there = ((tmp_path / place / "recording" / name) for place in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    reports = [CurveReport.from_json((tmp_path / place / "curve.json").read_text()) for place in ("here", "there")]
    assert reports[0].points == reports[1].points


def test_what_decides_the_answers_is_in_the_recording(data, tmp_path, monkeypatch):
    """The same weights under another config, noise of the card, or backend give other answers."""
    out, model = tmp_path / "c", EquilibriumReasoner.from_pretrained("sudoku-small")
    sizes = ["--out", out, "--depth", 2, "--breadth", 1, "--quick", "--limit", 2]
    model.save_pretrained(tmp_path / "m")
    eqr("curve", data, "--model", tmp_path / "m", *sizes)
    for name, card in (("m2", dict(noise_scale=0.3)), ("m3", dict(window=1))):
        model.card = dataclasses.replace(ModelCard(model.config, tol=0.03), **card)
        model.save_pretrained(tmp_path / name)
        output = eqr("curve", data, "--model", tmp_path / name, *sizes, code=2).stderr
        assert f"{next(iter(card))} was" in output
    weights = model.state_dict()
    other = EquilibriumReasoner(dataclasses.replace(model.config, H_cycles=1))
    other.load_state_dict(weights)
    other.save_pretrained(tmp_path / "m4")
    assert "config was" in eqr("curve", data, "--model", tmp_path / "m4", *sizes, code=2).stderr
    monkeypatch.setenv("EQR_BACKEND", "reference")
    assert "backend was" in eqr("curve", data, "--model", tmp_path / "m", *sizes, code=2).stderr


def test_without_matplotlib_it_stops_before_the_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = eqr("curve", data, "--out", tmp_path / "c", "--quick", code=2).stderr
    assert "a report needs matplotlib and jinja2: pip install" in output and not (tmp_path / "c").exists()


def test_another_model_seed_or_size_in_the_same_folder_is_refused(data, tmp_path):
    out = tmp_path / "c"
    eqr("curve", data, "--out", out, "--depth", 2, "--breadth", 1, "--quick")
    for change in (("--seed", 1), ("--depth", 3), ("--limit", 2)):
        name = {"--limit": "puzzles"}.get(change[0], change[0].strip("-"))
        arguments = ["--depth", 2, "--breadth", 1, "--quick", *change]
        output = eqr("curve", data, "--out", out, *arguments, code=2).stderr
        assert f"{name} was" in output and "--fresh starts afresh, --out names another folder" in output


@pytest.mark.slow
def test_a_target_beyond_reach_is_said_and_the_map_is_written(data, tmp_path):
    result, report = curve(tmp_path / "c", data, "--target", 1.0, "--budget", "1 nfe", code=1)
    assert report.recommendation.index is None and report.recommendation.arguments is None
    assert "no point of the map offers accuracy 1 and at most 1 nfe" in result.stderr
    assert len(report.points) > 10


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["1000 nfe", "10000 ms", "100 s", "900 USD"])
def test_budgets_buy_all_where_they_are_large(data, tmp_path, budget):
    _, report = curve(tmp_path / "c", data, "--budget", budget, "--price", 1)
    points, best = report.points, report.bend.best
    assert points[report.recommendation.index].accuracy == points[best].accuracy


@pytest.mark.slow
def test_a_model_that_never_converges(data, tmp_path):
    torch.manual_seed(0)
    model = EquilibriumReasoner(EqRConfig.sudoku_paper(**TINY)).eval()  # random weights do not contract
    model.card = ModelCard(model.config, tol=0.02)
    model.save_pretrained(tmp_path / "m")
    result, report = curve(tmp_path / "c", data, "--model", tmp_path / "m")
    assert report.bend.knee is None and len(report.bend.front) == 1 and report.residuals.auroc is None
    assert {(row.settled, row.times) for row in report.early_exit.rows} == {(0, 1)}
    assert report.settling.groups[0].settled == 0
    assert "no puzzle is answered right at any point of the map; `eqr diagnose` says why" in result.stdout


@pytest.mark.slow
def test_a_model_without_a_tolerance_or_noise(data, tmp_path):
    make_copier(tmp_path / "m", EqRConfig.sudoku_paper(**TINY, noise_scale=0.0))
    result, report = curve(tmp_path / "c", data, "--model", tmp_path / "m", "--reveal", 81)
    assert report.settings.card_tol is None and report.early_exit is None and report.settling is None
    assert report.settings.tols and "has no tolerance" in result.stdout
    assert report.points[report.bend.best].accuracy.share == 1.0


@pytest.mark.slow
def test_the_recommended_call_has_what_was_asked_for(data, tmp_path):
    options = ["--noise-scale", 0, "--window", 1, "--seed", 3, "--precision", "bf16", "--select", "vote"]
    _, report = curve(tmp_path / "c", data, *options, "--budget", "9999 nfe")
    arguments = report.recommendation.arguments
    for wanted in ("noise_scale=0.0", "window=1", "seed=3", 'precision="bf16"'):
        assert wanted in arguments
    _, report = curve(tmp_path / "plain", data, "--budget", "9999 nfe")
    assert "seed" not in report.recommendation.arguments and "noise" not in report.recommendation.arguments


@pytest.mark.slow
def test_a_model_whose_states_all_diverge(data, tmp_path):
    model = make_contractive(EqRConfig.sudoku_paper(**TINY))
    with torch.no_grad():
        model.embed_tokens.embedding_weight.mul_(1e37)  # finite, and its squares are not
    model.card = ModelCard(model.config, tol=0.02)
    model.save_pretrained(tmp_path / "m")
    _, report = curve(tmp_path / "c", data, "--model", tmp_path / "m")
    assert report.residuals.diverged == report.residuals.trajectories == 12
    assert {p.nfe for p in report.points} == {1, 2} and not any(p.accuracy.correct for p in report.points)


@pytest.mark.slow
def test_puzzles_of_our_own_where_no_file_is_named(tmp_path):
    _, report = curve(tmp_path / "c", "--limit", 6)
    assert report.puzzles.file is None
    assert report.puzzles.groups == {
        "generated_easy": 2,
        "generated_medium": 2,
        "generated_hard": 1,
        "generated_extreme": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--price", -1), "a price must be positive and finite"),
        (("--price", "nan"), "a price must be positive and finite"),
        (("--target", 95), "--target must be a share above 0 and up to 1"),
        (("--budget", "cheap"), "--budget must be a positive amount and its unit"),
        (("--budget", "0.02 USD"), "money needs --price"),
        (("--budget", "-3 ms"), "--budget must be a positive amount"),
        (("--budget", "1e999 ms"), "--budget must be a positive amount"),
        (("--tols", "small"), "--tols must be auto or numbers"),
        (("--tols", "0.1,-0.2"), "--tols must be positive"),
        (("--select", "first"), "is that of the races, which are mapped anyway"),
        (("--select", "best"), "--select must be residual, vote or q"),
        (("--out", "/nowhere/at/all"), "there is no folder"),
        (("--out", "/etc/hosts"), "is a file; name a folder"),
    ],
)
def test_wishes_that_make_no_sense(data, tmp_path, arguments, message):
    out = [] if "--out" in arguments else ["--out", tmp_path / "c"]
    output = eqr("curve", data, *out, "--depth", 1, "--breadth", 1, "--quick", *arguments, code=2).stderr
    assert message in output.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no puzzles"), ("question,answer\n", "holds no puzzles"), ("hello\n", "none of 1 rows could be read")],
)
def test_files_without_puzzles(tmp_path, text, message):
    (tmp_path / "empty.csv").write_text(text)
    result = eqr("curve", tmp_path / "empty.csv", "--out", tmp_path / "c", "--quick", code=2)
    assert message in result.stderr and not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_bad_line_is_named_and_the_others_are_mapped(data, tmp_path):
    path = tmp_path / "mixed.csv"
    path.write_text(data.read_text() + "easy,12,34,0\n")
    result, report = curve(tmp_path / "c", path, code=1)
    assert report.puzzles.count == 6 and len(report.errors) == 1 and "line 8" in result.stderr


@pytest.mark.slow
def test_nothing_of_the_map_depends_on_the_order_of_the_puzzles(data, tmp_path):
    lines = data.read_text().splitlines()
    order = np.random.default_rng(1).permutation(len(lines) - 1)
    shuffled = tmp_path / "shuffled.csv"
    shuffled.write_text("\n".join([lines[0], *(lines[1 + i] for i in order)]) + "\n")
    reports = [curve(tmp_path / name, path)[1] for name, path in (("a", data), ("b", shuffled))]
    assert [p.accuracy for p in reports[0].points] == [p.accuracy for p in reports[1].points]
    assert [p.nfe for p in reports[0].points] == pytest.approx([p.nfe for p in reports[1].points], rel=1e-12)
