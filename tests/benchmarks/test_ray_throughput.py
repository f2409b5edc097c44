"""benchmarks.studies.ray_throughput: what it computes and writes; Ray itself is in tests/distributed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from types import SimpleNamespace

import pytest

from eqr_kernels import EqRConfig
from eqr_kernels.distributed.engines import Local
from tests.support.commands import TINY, make_copier

pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'eqr_kernels[distributed]'")
study = importlib.import_module("benchmarks.studies.ray_throughput")


class Otherwise(Local):
    """An engine that answers from other starts."""

    def run(self, reader, skip, model, job):
        return super().run(reader, skip, model, dataclasses.replace(job, settings={**job.settings, "seed": 1}))


def test_a_rate_leaves_out_the_first_unit_whose_worker_had_to_start():
    assert study.rate([(10.0, 100), (12.0, 100), (15.0, 50)]) == 150 / 5
    with pytest.raises(ValueError, match="two units or more, got 1; lower --shard-rows"):
        study.rate([(10.0, 100)])


@pytest.mark.parametrize("broken", [False, True])
def test_it_loses_the_node_midway_and_compares_all_shards(tmp_path, monkeypatch, broken):
    removed: list[object] = []
    cluster = SimpleNamespace(remove_node=lambda node, allow_graceful: removed.append(node))
    monkeypatch.setattr(study, "cluster_of_two", lambda: contextlib.nullcontext((cluster, "second")))
    monkeypatch.setattr(study, "imported_ray", lambda: SimpleNamespace(nodes=lambda: [{"Alive": True}]))
    monkeypatch.setattr(study, "OnRay", lambda workers: Otherwise() if broken else Local())
    model = make_copier(tmp_path / "model", EqRConfig.sudoku(**TINY))
    sizes = ["--puzzles", 12, "--part", 6, "--rounds", 1, "--shard-rows", 3, "--model", model]
    code = study.main([str(a) for a in [*sizes, "--results", tmp_path / "results"]])
    report = json.loads((tmp_path / "results" / "ray_throughput.json").read_text())
    assert report["lost_node"]["equal_to_this_process"] is not broken and code == broken
    assert removed == ["second"] and report["lost_node"]["after_shards"] == 2
    assert (report["answered"], report["shards"], report["lost_node"]["units_given_back"]) == (12, 4, 4)
    rates = report["puzzles_a_second"]
    assert report["two_workers_against_one"] == rates["two_workers"][0] / rates["one_worker"][0]
