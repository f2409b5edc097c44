"""How much arithmetic a training step does, and how fast the machine multiplies matrices by itself."""

from __future__ import annotations

import statistics
import time

import torch

from eqr_kernels.config import EqRConfig

_LARGEST = {"cpu": 2048, "cuda": 8192}


def training_operations(config: EqRConfig) -> int:
    """Operations (a multiply-add is two) of the matrix products of one sample's training step, heads left out.

    Only the last latent recursion carries a gradient; its products cost three times as much, once for the result and
    once for the gradient of either operand.
    """
    s, d = config.seq_len, config.hidden_size
    block = 2 * 3 * s * d * config.swiglu_size(d)
    if config.mlp_t:
        block += 2 * 3 * d * s * config.swiglu_size(s)
    else:
        block += 2 * 4 * s * d * d + 2 * 2 * s * s * d  # projections; scores and sums
    with_gradient = (config.L_cycles + 1) * config.L_layers
    return block * (config.layers_per_step - with_gradient + 3 * with_gradient)


def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations a second of torch.matmul on big square matrices, the median of the calls of about `seconds`.

    The matrices are [2048, 2048] on a CPU and [8192, 8192] on a GPU, or smaller, down to [256, 256], where such a
    product alone would take too long (bfloat16 on a CPU without instructions for it).
    """

    def measured(a: torch.Tensor, b: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    end, size = time.perf_counter() + seconds, 256
    # A generator of its own: the run's numbers are not to depend on this.
    generator = torch.Generator(device).manual_seed(0)
    while True:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        measured(a, b)  # warms up
        once = measured(a, b)
        if size >= _LARGEST.get(device.type, 2048) or once > seconds / 16:
            break
        size *= 2
    times = [once]
    while time.perf_counter() < end or len(times) < 3:
        times.append(measured(a, b))
    return 2 * size**3 / statistics.median(times)
