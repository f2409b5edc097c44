"""benchmarks.recipe_scan: the same operations for every candidate, and the better ones go on."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from typer.main import get_command

from eqr_kernels.cli import app
from eqr_kernels.training_rate import training_operations
from eqr_kernels.training_state import FORMAT

scan = importlib.import_module("benchmarks.recipe_scan")

COLUMNS = ["step", "samples", "operations", "cpu_seconds", "clues", "source", "puzzles", "loss", "exact_16", "exact_64"]
SKILL = {"h1-l3": 0.5, "eqr": 0.2, "raw": 0.2, "d96": 0.4}
LOSS = {"h1-l3": 1.0, "eqr": 2.0, "raw": 1.5, "d96": 1.0}


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int]]:
    """Stands for `eqr train`: writes curves of candidates as good as `SKILL` says; what it was asked for."""
    asked = []

    def eqr(arguments, log, threads):
        # As the real command reads them.
        get_command(app).commands["train"].make_context("train", arguments[1:])
        option = dict(zip(arguments, arguments[1:], strict=False))
        out, steps = Path(option["--out"]), int(option["--steps"])
        asked.append((out.name, steps))
        path, new = out / "curve.csv", not (out / "curve.csv").is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            for clues, source in (*scan.JUDGED, scan.FORUM, ("published", "all")):
                costs = [steps, steps * 32, steps * 10, 1.5, clues, source, 9, LOSS[out.name]]
                writer.writerow(dict(zip(COLUMNS, [*costs, SKILL[out.name], SKILL[out.name]], strict=True)))
        settings = {"config": option_config(option), "batch_size": 32, "cycles": option["--cycles"]}
        manifest = {"format": FORMAT, "step": steps, "settings": {**settings, "curriculum": option["--curriculum"]}}
        (out / "state-0").mkdir(exist_ok=True)
        (out / "state-0" / "manifest.json").write_text(json.dumps(manifest))
        return 0

    monkeypatch.setattr(scan, "eqr", eqr)
    return asked


def option_config(option: dict[str, str]) -> dict:
    return scan.CANDIDATES[Path(option["--out"]).name].config().to_dict()


def main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["recipe_scan", *map(str, arguments)])
    return scan.main()


def test_every_candidate_gets_the_steps_that_hold_the_operations():
    # 3 products of 81 x 256 for each of 128 features and of 128 x 512 for each of 81 tokens; thrice with a gradient.
    block = 2 * 3 * (128 * 81 * 256 + 81 * 128 * 512)
    assert scan.CANDIDATES["h1-l3"].steps(5e13) == round(5e13 / (32 * 3 * 8 * block)) == 1363
    growing = scan.CANDIDATES["growing"]
    assert growing.cycles == "0:1x2x8,800:1x3x16,4000:1x6x16"
    first, second = 800 * 32 * 3 * 6 * block, 3200 * 32 * 3 * 8 * block
    assert growing.steps(first) == 800 and growing.steps(first + second) == 4000
    assert growing.steps(first + second + 10 * 32 * 3 * 14 * block) == 4010
    for candidate in scan.CANDIDATES.values():
        each = 32 * training_operations(candidate.config())
        assert candidate.cycles or abs(candidate.steps(1e14) * each - 1e14) <= each / 2


def test_the_better_go_on_and_a_scan_that_was_stopped_goes_on(trained, monkeypatch, tmp_path, capsys):
    arguments = ["--candidates", *SKILL, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    assert main(monkeypatch, *arguments, "--rungs", "1e13:4") == 0
    assert sorted(name for name, _ in trained) == sorted(SKILL)
    trained.clear()
    assert main(monkeypatch, *arguments, "--rungs", "1e13:4,2e13:3") == 0
    assert sorted(name for name, _ in trained) == ["d96", "h1-l3", "raw"]  # the lower forum loss breaks the tie
    (file,) = (tmp_path / "results").glob("*/recipe_scan.json")
    found = json.loads(file.read_text())
    assert [row["candidate"] for row in found["rows"]] == ["h1-l3", "d96", "raw", "eqr", "h1-l3", "d96", "raw"]
    assert found["rows"][0]["score"] == pytest.approx(0.5) and found["rows"][0]["parameters"] == 520_706
    assert "| 2e+13 | d96: d 96 |" in capsys.readouterr().out
    trained.clear()
    assert main(monkeypatch, "--table", file) == 0 and not trained
    assert "| 1e+13 | eqr: " in capsys.readouterr().out


def test_a_candidate_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "eqr", lambda *_: 2)
    with pytest.raises(RuntimeError, match="raw: exit code 2; see .*log.txt"):
        main(monkeypatch, "--candidates", "raw", "--runs", tmp_path, "--results", tmp_path, "--rungs", "1e13:1")


def test_a_run_of_another_recipe_is_refused(trained, monkeypatch, tmp_path):
    arguments = ["--candidates", "raw", "--runs", tmp_path, "--results", tmp_path / "results", "--rungs", "1e13:1"]
    main(monkeypatch, *arguments)
    changed = dataclasses.replace(scan.CANDIDATES["raw"], curriculum="0:40-50")
    monkeypatch.setitem(scan.CANDIDATES, "raw", changed)
    with pytest.raises(ValueError, match="raw has another curriculum"):
        main(monkeypatch, *arguments)
