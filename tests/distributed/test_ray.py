"""--engine ray on a cluster of two nodes on this machine: what is lost is done again, and the bits are the same."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.distributed.answers import Answering
from eqr_kernels.distributed.engines import Local, run_into
from eqr_kernels.distributed.on_ray import OnRay, _reasons
from eqr_kernels.distributed.reading import TableReader, find_tables
from eqr_kernels.distributed.shards import Shards
from eqr_kernels.distributed.units import Key
from tests.support.commands import TINY, eqr, eqr_json, make_copier
from tests.support.environment import needs_extension
from tests.support.gated_job import Gated
from tests.support.tables import rows, same_report, shards_of, write_csv, write_parquet

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'eqr_kernels[distributed]'")
pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'eqr_kernels[distributed]'")

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_extension]
SECONDS = 240
"""For a test, and for the start of the cluster: ten times what either takes."""


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    with time_limit("this test"):
        yield


@dataclasses.dataclass
class time_limit:  # noqa: N801
    """Raises in the main thread when it is over; elsewhere there is none."""

    what: str

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before: Any = signal.signal(signal.SIGALRM, self._over)
            self.left = signal.alarm(SECONDS)

    def _over(self, *_: Any) -> None:
        raise TimeoutError(f"{self.what} took more than {SECONDS} s")

    def __exit__(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.alarm(self.left)
            signal.signal(signal.SIGALRM, self.before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a second node of one CPU each, and a connection of this process to them."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = dict(num_cpus=1, object_store_memory=80 << 20)
    # A lost node is noticed in seconds.
    noticing = dict(health_check_period_ms=500, health_check_failure_threshold=4, health_check_initial_delay_ms=0)
    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            with time_limit("the cluster's start"):
                made.add_node(**node, include_dashboard=False, _system_config=noticing)
                made.second = made.add_node(**node)
                ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            with time_limit("the cluster's end"):
                ray.shutdown()
                made.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku(**TINY), tol=0.05)


def test_eqr_solve_and_eval_give_the_rows_and_the_report_of_this_process(cluster, model, tmp_path):
    data = write_csv(tmp_path / "puzzles.csv", rows(10))
    solving = ("solve", data, "--model", model, "--depth", 6, "--breadth", 2, "--shard-rows", 4)
    eqr(*solving, "--out", tmp_path / "local", code=1)
    on_ray = ("--engine", "ray", "--workers", 1, "--cpus-per-worker", 1)
    report = json.loads(eqr(*solving, *on_ray, "--out", tmp_path / "ray", "--json", code=1).stdout)
    assert report["shards"] == {"rows": 4, "count": 3, "found": 0, "rows_run": 10}
    assert [error["line"] for error in report["errors"]] == [5, 9]
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "local")
    assert "depth was 6 and is 7" in eqr(*solving, *on_ray, "--out", tmp_path / "ray", "--depth", 7, code=2).stderr
    told = eqr(*solving, "--engine", "ray", "--cpus-per-worker", 50, "--out", tmp_path / "none", code=2).stderr
    assert "no machine of the cluster has room for a worker of 50 CPUs: they have 1 CPUs and 0 GPUs, 1 CPUs" in told
    evaluating = ("eval", data, "--model", model, "--depths", "1,6", "--breadths", "1,2")
    same = eqr_json(*evaluating, *on_ray, "--shard-rows", 4, code=1)
    assert same_report(same, eqr_json(*evaluating, code=1))


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


def test_a_killed_worker_and_a_lost_node_cost_no_row_and_no_bit(cluster, model, tmp_path):
    """Both while each worker has a unit; two shards were there before, and are not asked for."""
    reasoner = EquilibriumReasoner.from_pretrained(model)
    data = write_parquet(tmp_path / "puzzles.parquet", rows(42))
    reader = TableReader(find_tables(str(data), "auto"), "sudoku", 81, 3)
    job = Answering("sudoku", dict(depth=6, breadth=2, tol=0.05, seed=3))
    want = Shards(tmp_path / "local", {"seed": 3})
    assert run_into(want, Local(), reader, reasoner, job) == 42

    got = Shards(tmp_path / "ray", {"seed": 3})
    for key in (Key(0, 0), Key(0, 5)):
        got.write(key, want.read(key))
    gate = tmp_path / "gate"
    gate.mkdir()
    gated = Gated(job, gate, place=4)
    written: list[Key] = []
    failures: list[BaseException] = []

    def lose() -> None:
        try:
            first, _ = gated.waiting(2)
            assert {path.read_text() for path in gate.glob("waiting-*")} == {"1"}, "a thread for each CPU asked for"
            os.kill(first, signal.SIGKILL)
            cluster.remove_node(cluster.second, allow_graceful=False)
        except BaseException as error:
            failures.append(error)
        finally:
            gated.open()

    write = got.write
    got.write = lambda key, table: (written.append(key), write(key, table))  # type: ignore[method-assign]
    losing = threading.Thread(target=lose)
    losing.start()
    try:
        assert run_into(got, OnRay(), reader, reasoner, gated) == 36
    finally:
        losing.join(SECONDS)
    assert not failures, failures
    assert len(ray.nodes()) == 2 and sum(node["Alive"] for node in ray.nodes()) == 1
    assert sorted(written) == [Key(0, place) for place in range(14) if place not in (0, 5)], "each unit once"
    assert shards_of(tmp_path / "ray") == shards_of(tmp_path / "local")
