"""benchmarks.studies.recipe_scan: the same operations for every candidate, and the better ones go on."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from eqr_kernels.cli import load_command
from eqr_kernels.training.recipes import RECIPES
from eqr_kernels.training.state import FORMAT
from eqr_kernels.training.throughput import training_operations

scan = importlib.import_module("benchmarks.studies.recipe_scan")

COLUMNS = ["step", "samples", "operations", "cpu_seconds", "clues", "source", "puzzles", "loss", "exact_16", "exact_64"]
SKILL = {"small": 0.5, "two": 0.2, "raw": 0.2, "d192": 0.4}
LOSS = {"small": 1.0, "two": 2.0, "raw": 1.5, "d192": 1.0}


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int]]:
    """Stands for `eqr train`: writes curves of candidates as good as `SKILL` says; what it was asked for."""
    calls = []

    def eqr(arguments, log, threads):
        # As the real command reads them.
        load_command("train").make_context("train", arguments[1:])
        option = dict(zip(arguments, arguments[1:], strict=False))
        out, steps = Path(option["--out"]), int(option["--steps"])
        calls.append((out.name, steps))
        path, new = out / "curve.csv", not (out / "curve.csv").is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for clues, source in (*scan.JUDGED, scan.FORUM, ("published", "all")):
                costs = [steps, steps * 32, steps * 10, 1.5, clues, source, 9, LOSS[out.name]]
                writer.writerow(dict(zip(COLUMNS, [*costs, SKILL[out.name], SKILL[out.name]], strict=True)))
        settings = {
            "config": scan.CANDIDATES[out.name].config().to_dict(),
            "batch_size": int(option["--batch-size"]),
            "lr": float(option["--lr"]),
            "weight_decay": float(option["--weight-decay"]),
            "curriculum": option["--curriculum"],
            "cycles": option["--cycles"],
        }
        manifest = {"format": FORMAT, "step": steps, "settings": settings}
        (out / "state-0").mkdir(exist_ok=True)
        (out / "state-0" / "manifest.json").write_text(json.dumps(manifest))
        return 0

    monkeypatch.setattr(scan, "eqr", eqr)
    return calls


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["recipe_scan", *map(str, arguments)])
    return scan.main()


def test_every_candidate_gets_the_steps_that_hold_the_operations():
    # 3 products of 81 x 256 for each of 128 features and of 128 x 512 for each of 81 tokens; thrice with a gradient.
    block = 2 * 3 * (128 * 81 * 256 + 81 * 128 * 512)
    assert scan.CANDIDATES["noisy"].steps(5e13) == round(5e13 / (32 * 3 * 8 * block)) == 1363
    growing = scan.CANDIDATES["growing"]
    assert growing.cycles == "0:1x3x8,500:2x3x16,3000:2x6x16"
    first, second = 500 * 96 * 3 * 4 * block, 2500 * 96 * 4 * 4 * block
    assert growing.steps(first) == 500 and growing.steps(first + second) == 3000
    assert growing.steps(first + second + 10 * 96 * 4 * 7 * block) == 3010
    for candidate in scan.CANDIDATES.values():
        each = candidate.batch * training_operations(candidate.config())
        assert candidate.cycles or abs(candidate.steps(1e14) * each - 1e14) <= each / 2
    # The same samples show the same clues, and the first is the recipe of its preset.
    assert scan.CANDIDATES["small"].curriculum == RECIPES["sudoku-small"]["curriculum"]
    assert scan.CANDIDATES["small-batch"].curriculum == "0:34-50,3600:30-46,12000:20-40,19500:17-38"
    assert scan.CANDIDATES["raw"].curriculum == ""


def test_the_better_go_on_and_a_scan_that_was_stopped_goes_on(trained, monkeypatch, tmp_path, capsys):
    arguments = ["--candidates", *SKILL, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    assert main(monkeypatch, *arguments, "--rungs", "1e13:4") == 0
    assert sorted(name for name, _ in trained) == sorted(SKILL)
    trained.clear()
    assert main(monkeypatch, *arguments, "--rungs", "1e13:4,2e13:3") == 0
    assert sorted(name for name, _ in trained) == ["d192", "raw", "small"]  # the lower forum loss breaks the tie
    (file,) = (tmp_path / "results").glob("*/recipe_scan.json")
    report = json.loads(file.read_text())
    assert [row["candidate"] for row in report["rows"]] == ["small", "d192", "raw", "two", "small", "d192", "raw"]
    assert report["rows"][0]["score"] == pytest.approx(0.5) and report["rows"][0]["parameters"] == 261_890
    assert "| 2e+13 | d192: small, d 192 |" in capsys.readouterr().out
    # The results alone are enough, unless a recipe has changed since.
    trained.clear()
    elsewhere = [*arguments[:-3], tmp_path / "elsewhere", *arguments[-2:], "--puzzles", 9]
    assert main(monkeypatch, *elsewhere, "--rungs", "1e13:4,2e13:3") == 0 and not trained
    assert json.loads(file.read_text())["rows"] == report["rows"]
    monkeypatch.setitem(scan.CANDIDATES, "two", dataclasses.replace(scan.CANDIDATES["two"], lr=3e-3))
    assert main(monkeypatch, *elsewhere, "--rungs", "1e13:4,2e13:3") == 0
    assert [name for name, _ in trained] == ["two"]
    trained.clear()
    assert main(monkeypatch, "--table", file) == 0 and not trained
    assert "| 1e+13 | two: " in capsys.readouterr().out


def test_a_candidate_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "eqr", lambda *_: 2)
    with pytest.raises(RuntimeError, match="raw: exit code 2; see .*log.txt"):
        main(monkeypatch, "--candidates", "raw", "--runs", tmp_path, "--results", tmp_path, "--rungs", "1e13:1")


def test_a_run_of_another_recipe_is_refused(trained, monkeypatch, tmp_path):
    arguments = ["--candidates", "raw", "--runs", tmp_path, "--results", tmp_path / "results", "--rungs", "1e13:1"]
    main(monkeypatch, *arguments)
    changed = dataclasses.replace(scan.CANDIDATES["raw"], points=((0, 40, 50),))
    monkeypatch.setitem(scan.CANDIDATES, "raw", changed)
    with pytest.raises(ValueError, match="raw has another curriculum"):
        main(monkeypatch, *arguments)
