"""--engine ray on a cluster of two nodes on this machine: what is lost is done again, and the bits are the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eqr_kernels import EqRConfig
from eqr_kernels.distributed.answers import Answering
from eqr_kernels.distributed.on_ray import _reasons
from eqr_kernels.distributed.shards import Shards
from eqr_kernels.distributed.units import Key
from tests.support.commands import TINY, eqr, eqr_json, make_copier
from tests.support.environment import needs_extension
from tests.support.gated_job import Gated, waiting
from tests.support.ray_cluster import SECONDS, time_limit, two_nodes
from tests.support.tables import rows, same_report, shards_of, write_csv, write_parquet

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'eqr_kernels[distributed]'")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'eqr_kernels[distributed]'")

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_extension]


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    with time_limit("this test"):
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku(**TINY), tol=0.05)


ON_RAY = ("--engine", "ray", "--cpus-per-worker", 1)


def test_the_report_of_eval_is_that_of_this_process(cluster, model, tmp_path):
    data = write_csv(tmp_path / "puzzles.csv", rows(10))
    evaluating = ("eval", data, "--model", model, "--depths", "1,6", "--breadths", "1,2")
    report = eqr_json(*evaluating, *ON_RAY, "--workers", 1, "--shard-rows", 4, code=1)
    assert same_report(report, eqr_json(*evaluating, code=1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "\x1b[36mray::Actor.submit()\n  File x\nValueError: no\nray.exceptions.UserCodeException: x",
            "ValueError: no",
        ),
        ("The actor died, ray::Actor.__init__()\n  File x\nRuntimeError: other torch", "RuntimeError: other torch"),
        ("The node was lost.\nMore.", "The node was lost."),
    ],
)
def test_what_a_worker_raised_is_one_line(text, reason):
    with pytest.raises(RuntimeError, match=f"the work failed on the cluster: {reason}") as raised, _reasons():
        raise ray.exceptions.RayError(text)
    assert "\n" not in str(raised.value)


def test_a_killed_worker_and_a_lost_node_cost_no_row_and_no_bit(cluster, model, tmp_path, monkeypatch):
    """Both while each worker has a unit; two shards were there before, and are not asked for."""
    data, here, there = write_parquet(tmp_path / "puzzles.parquet", rows(42)), tmp_path / "here", tmp_path / "there"
    solving = ("solve", data, "--model", model, "--depth", 6, "--breadth", 2, "--seed", 3, "--shard-rows", 3, "--out")
    eqr(*solving, here, code=1)
    shutil.copytree(here, there)
    for place in range(14):
        if place not in (0, 5):
            (there / f"part-00000-{place:08d}.parquet").unlink()

    gate = tmp_path / "gate"
    gate.mkdir()
    monkeypatch.setattr("eqr_kernels.cli.solve_table.Answering", lambda *job: Gated(Answering(*job), gate, place=4))
    written: list[Key] = []
    write = Shards.write
    monkeypatch.setattr(Shards, "write", lambda self, key, table: (written.append(key), write(self, key, table)))
    failures: list[BaseException] = []

    def lose() -> None:
        try:
            first, _ = waiting(gate, 2)
            os.kill(first, signal.SIGKILL)
            cluster.remove_node(cluster.second, allow_graceful=False)
        except BaseException as error:
            failures.append(error)
        finally:
            (gate / "open").touch()

    losing = threading.Thread(target=lose)
    losing.start()
    try:
        eqr(*solving, there, *ON_RAY, "--output", tmp_path / "report.json", code=1)
    finally:
        losing.join(SECONDS)
    assert not failures, failures
    assert {path.read_text() for path in gate.glob("waiting-*")} == {"1"}, "a thread for each CPU that is asked for"
    assert len(ray.nodes()) == 2 and sum(node["Alive"] for node in ray.nodes()) == 1
    assert sorted(written) == [Key(0, place) for place in range(14) if place not in (0, 5)], "each unit once"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["shards"] == {"rows": 3, "count": 14, "found": 2, "rows_run": 36}
    assert shards_of(there) == shards_of(here)

    assert "depth was 6 and is 7" in eqr(*solving, there, *ON_RAY, "--depth", 7, code=2).stderr
    output = eqr(*solving, tmp_path / "none", *ON_RAY, "--cpus-per-worker", 50, code=2).stderr
    assert "no machine of the cluster has room for a worker of 50 CPUs: they have 1 CPUs and 0 GPUs" in output
