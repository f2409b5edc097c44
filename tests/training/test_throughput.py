"""Operations of a training step, counted by hand, and the rate of matrix products, on a clock that is set by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eqr_kernels import EqRConfig
from eqr_kernels.training import throughput
from eqr_kernels.training.throughput import gemm_rate, training_operations


def test_operations_of_the_presets():
    # Gate, up and down are 3 products of 81 x 256 for each of d features, then of d x k for each of 81 tokens.
    # 3 recursions of 7 updates of 2 blocks: 28 without a gradient, 14 with, each of which counts three times: 70.
    sudoku = 2 * 3 * (512 * 81 * 256 + 81 * 512 * 1536)
    assert training_operations(EqRConfig.sudoku_paper()) == 70 * sudoku == 31_213_486_080
    # 2 recursions of 4 updates of one block: 4 without, 4 with.
    small = 2 * 3 * (128 * 81 * 256 + 81 * 128 * 512)
    assert training_operations(EqRConfig.sudoku_small()) == 16 * small == 764_411_904
    # 3 recursions of 5 updates of one block: 10 without, 5 with. Queries, keys, values and output; scores and sums.
    maze = 2 * (4 * 900 * 128 * 128 + 2 * 900 * 900 * 128 + 3 * 900 * 128 * 512)
    assert training_operations(EqRConfig.maze()) == 25 * maze == 22_164_480_000


def test_every_recursion_carries_a_gradient_where_there_is_one_only():
    one, two = (training_operations(EqRConfig.sudoku_small(H_cycles=h)) for h in (1, 2))
    assert 4 * one == 3 * two


@pytest.mark.parametrize(("speed", "size"), [(4e11, 2048), (1e9, 256)])
def test_gemm_rate_is_the_median_of_the_largest_size_that_is_quick_enough(monkeypatch, speed, size):
    now, sizes = [10.0], []

    def matmul(a, b):
        assert a.shape == b.shape == (len(a), len(a)) and a.dtype == b.dtype == torch.bfloat16
        sizes.append(len(a))
        # Every third call is disturbed.
        now[0] += 2 * len(a) ** 3 / speed * (5 if len(sizes) % 3 == 0 else 1)

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch, "matmul", matmul)
    assert gemm_rate(torch.device("cpu"), torch.bfloat16) == pytest.approx(speed, rel=1e-9)
    assert sizes[-1] == max(sizes) == size and now[0] < 10.0 + 1.2


def test_gemm_rate_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert gemm_rate(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8
    assert torch.equal(torch.rand(4), expected)
