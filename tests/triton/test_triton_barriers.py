"""Whether barriers stand wherever one thread may read what another writes: seen from the interpreter's accesses.

The interpreter has no threads, so that a missing barrier changes nothing there. But it knows every address that is
read and written, and between two barriers no address may be written and then read, nor read and then written by
another operation.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from eqr_kernels import Engine
from tests.support.models import make_contractive, tiny_config
from tests.support.triton_tiles import with_tiles

IN_INTERPRETER = True
pytest_plugins = ["tests.support.triton_interpreter"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton"),
]


class Monitor:
    """Addresses that were read and written since the last barrier."""

    def __init__(self) -> None:
        self.barriers = 0
        self.hazards: set[str] = set()
        self.clear()

    def clear(self) -> None:
        self.read: list[Any] = []
        self.written = np.zeros(0, np.uint64)

    def barrier(self) -> None:
        self.barriers += 1
        self.clear()

    def load(self, addresses: Any) -> None:
        if np.isin(addresses, self.written, assume_unique=False).any():
            self.hazards.add(f"read after write: {_place()}")
        self.read.append(addresses)

    def store(self, addresses: Any) -> None:
        place = _place()
        for earlier in self.read:
            # The very same addresses in the same order are the same threads' own, where no product comes between.
            own = "in damped_update" in place and earlier.shape == addresses.shape and (earlier == addresses).all()
            if not own and np.isin(earlier, addresses).any():
                self.hazards.add(f"write after read: {place}")
        self.written = np.union1d(self.written, addresses)


def _place() -> str:
    """The line of the kernel that is being interpreted."""
    import traceback

    lines = [f for f in traceback.extract_stack() if "backends/triton/kernels/" in f.filename]
    return f"{lines[-1].filename.rsplit('/', 1)[1]} in {lines[-1].name}, line {lines[-1].lineno}" if lines else "?"


@pytest.fixture
def monitor(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Monitor()

    def watch(name: str, tell: Any, mask_at: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[mask_at].data
            tell(np.broadcast_to(pointers.data, mask.shape)[mask])
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    watch("create_masked_load", seen.load, 0)
    watch("create_masked_store", seen.store, 1)
    monkeypatch.setattr(InterpreterBuilder, "create_barrier", lambda self: seen.barrier())
    return seen


CASES = {
    "mlp_t": (dict(L_layers=2), {}),
    "mlp_t, two passes": (dict(hidden_size=32), dict(one_pass=False, columns=16)),
    "attention": (dict(mlp_t=False, pos_encodings="rope", hidden_size=32), dict(columns=16)),
}


@pytest.mark.parametrize(("changes", "tiles"), CASES.values(), ids=CASES.keys())
def test_no_thread_reads_what_another_may_not_have_written(monitor, monkeypatch, changes, tiles):
    with_tiles(monkeypatch, **tiles, row_features=16)
    model = make_contractive(tiny_config(H_cycles=1, L_cycles=1, **changes))
    tokens = torch.randint(1, 7, (2, 6), generator=torch.Generator().manual_seed(1))
    # Two trajectories in one slot, a race that the second loses, and checkpoints.
    model.solve(
        tokens[[0, 0, 1]],
        depth=3,
        halt="residual",
        tol=0.5,
        breadth=2,
        select="first",
        slots=1,
        backend="triton",
        checkpoints=(1, 2, 3),
        trace=True,
    )
    assert not monitor.hazards, monitor.hazards
    assert monitor.barriers > 20


def test_nor_in_launches_of_quanta(monitor, monkeypatch):
    from eqr_kernels.backends.triton import launch

    compute = launch.launch

    def launched(*arguments: Any) -> None:
        monitor.clear()  # what a launch writes the next may read
        compute(*arguments)

    monkeypatch.setattr(launch, "launch", launched)
    model = make_contractive(tiny_config(H_cycles=1, L_cycles=1))
    tokens = torch.randint(1, 7, (2, 6), generator=torch.Generator().manual_seed(1))
    rules: dict[str, Any] = dict(depth=5, tol=0.1, patience=2, checkpoints=(1, 3), trace=True)
    with Engine(model, quantum=2, backend="triton", **rules) as engine:
        assert engine.submit(tokens, breadth=2, select="first").result(60).nfe.sum() > 8
    assert not monitor.hazards, monitor.hazards
    assert monitor.barriers > 20
