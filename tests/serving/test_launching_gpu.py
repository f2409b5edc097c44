"""An engine on a GPU: launches of quanta, states parked on the device, the bits of `solve`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eqr_kernels import Engine, EqRConfig
from tests.support.cuda import SMALL, TOL
from tests.support.models import make_contractive
from tests.support.serving import PATIENCE, assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false"),
]
CASES: tuple[dict[str, Any], ...] = (
    dict(),
    dict(breadth=3, select="vote", noise_scale=0.01),
    dict(trace=True, checkpoints=(1, 4)),
    dict(halt="none", window=2),
)


@pytest.mark.parametrize(
    ("backend", "regime"), [("cuda", "throughput"), ("cuda", "latency"), ("cuda", "auto"), ("triton", "auto")]
)
def test_each_gets_the_bits_of_solve_in_any_company(backend, regime, monkeypatch):
    monkeypatch.setenv("EQR_CUDA_REGIME", regime)
    monkeypatch.setenv("EQR_TRITON_TUNE", "0")
    model = make_contractive(EqRConfig.from_dict({**SMALL, "vocab_size": 7, "num_heads": 2, "noise_scale": 0.0})).cuda()
    tokens = torch.randint(1, 7, (12, 9), generator=torch.Generator().manual_seed(1)).cuda()
    rules: dict[str, Any] = dict(tol=TOL, depth=7, backend=backend, precision="bf16", return_all=True)
    rows = {(i, c): tokens[i : i + 1 + 11 * (i == 0)] for i in range(5) for c in range(len(CASES))}
    want = {(i, c): model.solve(puzzles, **{**rules, **CASES[c]}) for (i, c), puzzles in rows.items()}
    with Engine(model, quantum=2, max_in_flight=64, **rules) as engine:
        futures = {(i, c): engine.submit(puzzles, **CASES[c]) for (i, c), puzzles in rows.items()}
        for key, future in futures.items():
            got = future.result(PATIENCE)
            got.backend_reason = want[key].backend_reason = ""
            assert_equal(got, want[key], str(key))
        assert engine.stats().steps == sum(int(result.nfe.sum()) for result in want.values())
