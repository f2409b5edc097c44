"""`eqr solve --out` and `eqr eval --out` in this process: the rows, and what is gone on with and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.distributed.answers import schema
from eqr_kernels.distributed.engines import Local
from eqr_kernels.distributed.job import PackedModel
from eqr_kernels.distributed.recordings import fill
from eqr_kernels.distributed.shards import MANIFEST, Shards
from eqr_kernels.studies.curve import CurveMap, Request
from eqr_kernels.studies.recording import record
from eqr_kernels.studies.store import Store
from eqr_kernels.tasks import sudoku
from tests.support.commands import TINY, eqr, eqr_json, make_copier
from tests.support.tables import BAD, rows, same_report, shards_of, write_csv, write_parquet

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'eqr_kernels[distributed]'")

ROWS = 10
SETTINGS = ("--depth", 6, "--breadth", 2, "--tol", 0.05)
VIEWS = ("--depth", 6, "--views", 2, "--tol", 0.05)
TURNS = (*SETTINGS, "--turn-every", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku(**TINY), tol=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "puzzles.csv", rows(ROWS))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "answers.parquet"


def solve(data: Path, model: Path, out: Path, *more: object, code: int = 1, settings: tuple[object, ...] = SETTINGS):
    return eqr("solve", data, "--model", model, *settings, "--out", out, "--shard-rows", 4, *more, code=code)


@pytest.mark.parametrize("settings", [SETTINGS, VIEWS, TURNS], ids=["restarts", "views", "turns"])
def test_each_row_is_there_once_as_solve_answers_it(data, model, out, settings):
    report = json.loads(solve(data, model, out, "--json", settings=settings).stdout)
    alone = eqr_json("solve", data, "--model", model, *settings, code=1)
    table = parquet.read_table(out)
    assert table.schema.remove_metadata() == schema()
    got = table.to_pylist()
    assert [row["line"] for row in got] == list(range(2, ROWS + 2))
    bad = [row for row in got if row["status"] == "error"]
    assert [row["line"] for row in bad] == [i + 2 for i in BAD]
    assert all("5 cells" in row["error"] and "12345" in row["text"] and row["puzzle"] is None for row in bad)
    good = [row for row in got if row["status"] != "error"]
    assert [row["id"] for row in good] == [f"name {i}" for i in range(ROWS) if i not in BAD]
    for row, want in zip(good, alone["puzzles"], strict=True):
        assert row["error"] is None and row["file"] == "puzzles.csv"
        for name in set(want) & set(row):
            assert row[name] == want[name] or name == "answer", name
    assert all(row["answer"] for row in good)
    same = {name: value for name, value in alone["summary"].items() if name != "seconds"}
    assert {name: report["summary"][name] for name in same} == same
    assert [error["line"] for error in report["errors"]] == [i + 2 for i in BAD]


def test_the_numbers_are_those_of_the_result_bit_for_bit(data, model, out):
    solve(data, model, out)
    reasoner = EquilibriumReasoner.from_pretrained(model)
    puzzles, _ = sudoku.load(data)
    result = reasoner.solve(torch.from_numpy(puzzles.inputs.astype(np.int64)), depth=6, breadth=2, tol=0.05)
    table = parquet.read_table(out, filters=[("status", "!=", "error")])
    for name in ("residual", "score", "q_halt", "steps", "nfe", "restart", "converged"):
        want = getattr(result, name).numpy()
        if result.backend == "reference" and want.dtype == np.float32:
            np.testing.assert_allclose(table[name].to_numpy(), want, rtol=1e-4)
        else:
            np.testing.assert_array_equal(table[name].to_numpy(), want, name)


@pytest.mark.parametrize("kind", ["a Parquet file", "a folder", "stdin", "revealed clues"])
def test_other_inputs_hold_the_same_rows(data, model, out, tmp_path, kind):
    more, source, input = [], data, None
    if kind == "a Parquet file":
        source = write_parquet(tmp_path / "p.parquet", rows(ROWS))
    elif kind == "a folder":
        source = tmp_path / "tables"
        source.mkdir()
        write_csv(source / "1.csv", rows(ROWS)[:7])
        write_parquet(source / "2.parquet", rows(ROWS)[7:])
    elif kind == "stdin":
        source, input = "-", data.read_text()
    else:
        more = ["--reveal", 81]
    arguments = ("solve", source, "--model", model, *SETTINGS, "--out", out, "--shard-rows", 3, *more)
    eqr(*arguments, input=input, code=1)
    got = parquet.read_table(out).to_pylist()
    assert len(got) == ROWS and [row["status"] == "error" for row in got] == [i in BAD for i in range(ROWS)]
    if kind == "revealed clues":
        assert all(row["puzzle"] == row["answer"] for row in got)
        return
    other = tmp_path / "other.parquet"
    solve(data, model, other)
    columns = ["id", "puzzle", "prediction", "residual", "nfe", "random_id", "error"]
    assert parquet.read_table(out, columns=columns) == parquet.read_table(other, columns=columns)


def test_what_is_there_is_not_done_again_and_what_is_broken_is(data, model, out):
    solve(data, model, out)
    before = shards_of(out)
    assert list(before) == [f"part-00000-0000000{i}.parquet" for i in range(3)]
    assert json.loads(solve(data, model, out, "--json").stdout)["shards"]["rows_run"] == 0
    first, second, third = (out / name for name in before)
    first.unlink()
    second.write_bytes(before[second.name][:-20])  # as a copy that was cut
    (out / ".part-00000-00000002.parquet.0123abcd.part").write_bytes(b"PAR1")  # as a run that was killed leaves it
    untouched = third.stat().st_mtime_ns
    report = json.loads(solve(data, model, out, "--json").stdout)
    assert report["shards"] == {"rows": 4, "count": 3, "found": 1, "rows_run": 8}
    assert shards_of(out) == before and third.stat().st_mtime_ns == untouched
    assert parquet.read_table(out).num_rows == ROWS


def test_an_interruption_keeps_what_is_done(data, model, out, monkeypatch):
    write = Shards.write

    def interrupted(self, key, table):
        if key.place == 1:
            raise KeyboardInterrupt
        write(self, key, table)

    monkeypatch.setattr(Shards, "write", interrupted)
    output = solve(data, model, out, code=130).stderr
    assert f"1 shards are kept in {out}, and the same command goes on from there" in output
    monkeypatch.setattr(Shards, "write", write)
    report = json.loads(solve(data, model, out, "--json").stdout)
    assert report["shards"] == {"rows": 4, "count": 3, "found": 1, "rows_run": 6}
    assert parquet.read_table(out)["line"].to_pylist() == list(range(2, ROWS + 2))


def test_results_of_other_settings_are_refused(data, model, out, tmp_path):
    solve(data, model, out)
    before = shards_of(out)
    for more, message in (
        (["--depth", 7], "depth was 6 and is 7"),
        (["--tol", 0.06], "tol was 0.05 and is 0.06"),
        (["--seed", 1], "seed was 0 and is 1"),
        (["--shard-rows", 5], "rows was 4 and is 5"),
        (["--noise-scale", 0.5], "noise_scale was 0.01 and is 0.5"),
        (["--backend", "reference", "--precision", "fp32"], "backend was 'cpu' and is 'reference'"),
        (["--check"], "check was False and is True"),
    ):
        if "reference" in more and json.loads((out / MANIFEST).read_text())["backend"] == "reference":
            continue
        text = solve(data, model, out, *more, code=2).stderr
        assert f"{out} holds results of another run: " in text and message in text
        assert "name another --out, or remove the folder" in text
    assert "views was None and is True" in solve(data, model, out, settings=VIEWS, code=2).stderr
    assert "turn_every was None and is 2" in solve(data, model, out, settings=TURNS, code=2).stderr
    other = tmp_path / data.name
    other.write_text(data.read_text().replace("name 1", "name one"))
    assert "input was" in solve(other, model, out, code=2).stderr
    weights = make_copier(tmp_path / "m", EqRConfig.sudoku(**TINY), tol=0.05)
    reasoner = EquilibriumReasoner.from_pretrained(weights)
    with torch.no_grad():
        reasoner.lm_head.weight[5] += 1
    reasoner.save_pretrained(weights)
    assert "weights was" in solve(data, weights, out, code=2).stderr
    assert shards_of(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "ray"], "--engine ray and --shard-rows write to a folder; name it with --out"),
        (["--engine", "spark", "--out", "OUT"], "--engine must be one of local, ray, got 'spark'"),
        (["--address", "auto", "--out", "OUT"], "--address is for --engine ray, and --engine is local"),
        (["--cpus-per-worker", 2, "--out", "OUT"], "--cpus-per-worker is for --engine ray"),
        (["--out", "OUT", "--by-depth", "1,2"], "--out writes a table, which has no place for --by-depth"),
        (["--out", "OUT", "--shard-rows", 5000], "rows of a shard must be 1 to 1000, got 5000"),
        (["--out", "OUT", "--depth", 0], "depth must be at least 1, got 0"),
        (["--out", "FILE"], "is a file; results are a folder of Parquet files"),
        (["--out", "FULL"], "holds something else than results of this command"),
        (["--out", "NONE/OUT"], "there is no folder"),
        (["--out", "OUT", "--engine", "ray", "--address", "ray://host:10001"], "is that of a Ray Client"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_work(data, model, tmp_path, arguments, message):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("")
    places = [tmp_path / a if str(a).split("/")[0] in ("OUT", "FILE", "FULL", "NONE") else a for a in arguments]
    assert message in eqr("solve", data, "--model", model, *places, code=2).stderr
    assert not list(tmp_path.glob("OUT/part-*"))


def test_without_pyarrow_it_says_what_to_install(data, model, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'eqr_kernels[distributed]'" in solve(data, model, out, code=2).stderr


def test_a_file_of_bad_rows_alone_is_kept_and_no_success(model, out, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("id,question\n" + "1,rubbish\n" * 3)
    solve(path, model, out, code=2)
    assert parquet.read_table(out)["status"].to_pylist() == ["error"] * 3


EVAL = ("--depths", "1,2,6", "--select", "residual,any")


@pytest.mark.parametrize("halt", ["none", "residual"])
@pytest.mark.parametrize(
    "breadths", [("--breadths", "1,2"), ("--views", "1,2"), ("--breadths", "1,2", "--turn-every", 2)]
)
def test_the_report_of_eval_is_the_same_and_goes_on(data, model, out, halt, breadths):
    arguments = ("eval", data, "--model", model, *EVAL, *breadths, "--halt", halt)
    want = eqr_json(*arguments, code=1)
    kept = (*arguments, "--out", out, "--shard-rows", 3)
    assert same_report(eqr_json(*kept, code=1), want)
    before = shards_of(out)
    assert len(before) == 3
    (out / "part-00000-00000001.parquet").unlink()
    assert same_report(eqr_json(*kept, code=1), want) and shards_of(out) == before
    assert "depths was [1, 2, 6] and is [1, 4]" in eqr(*kept, "--depths", "1,4", code=2).stderr
    first = parquet.read_table(out)
    assert first.num_rows == ROWS - len(BAD) and len(first["correct"][0].as_py()) == 2 * 3


def test_a_map_is_filled_with_the_parts_that_it_would_record(data, model, tmp_path):
    reasoner = EquilibriumReasoner.from_pretrained(model)
    puzzles, _ = sudoku.load(data)
    options = dict(window=None, noise_scale=None, slots=None, backend="auto", precision="auto")
    request = Request(depth=3, breadth=2, tols=(0.05,), options=options)
    mapping = CurveMap(reasoner, puzzles, "digest", request, tmp_path / "parts", fresh=False)
    mapping.chunk = 3
    want = record(reasoner, puzzles.inputs, puzzles.labels, depths=mapping.recorded, breadth=2, chunk=3, **options)
    fill(Local(), mapping, "sudoku")
    for start in range(0, len(puzzles), 3):
        part = mapping.store.load(start)
        for name, array in part.arrays().items():
            np.testing.assert_array_equal(array, getattr(want, name)[start : start + 3], name)
    calls: list[int] = []
    Store.save, save = lambda self, start, part: calls.append(start), Store.save
    try:
        fill(Local(), mapping, "sudoku")
    finally:
        Store.save = save
    assert calls == []


def test_a_model_travels_as_weights_and_card(model):
    reasoner = EquilibriumReasoner.from_pretrained(model)
    packed, weights = PackedModel.of(reasoner, {"noise_scale": 0.5})
    other = packed.unpack(weights)
    assert other.card == reasoner.card and not other.training
    for name, weight in reasoner.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=0, atol=0)
    for name, value in (("torch", "1.0"), ("backend", "triton"), ("noise_scale", 0.25)):
        changed = dataclasses.replace(packed, decides={**packed.decides, name: value})
        with pytest.raises(RuntimeError, match=f"this worker would answer otherwise .*: {name} is .* here and {value}"):
            changed.unpack(weights)
    half, weights = PackedModel.of(reasoner.bfloat16(), {})
    assert half.unpack(weights).dtype == torch.bfloat16
    reasoner.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a forward hook; a model on other machines is its weights"):
        PackedModel.of(reasoner, {})
