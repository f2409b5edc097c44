"""Words and normals of the random streams (Philox4x32-10)."""

from __future__ import annotations

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require


def philox_words(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` random words of each row's stream, as `eqr_kernels.noise.philox_words`: int64 [n, numel].

    Args:
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is out of range.
    """
    require()
    check.rng(rng)
    words: Tensor = torch.ops.eqr_kernels.philox_words.default(rng, stream, numel)
    return words


def philox_normal(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` standard normals of each row's stream, as `damped_update` draws them: float32 [n, numel].

    Arguments and errors are those of `philox_words`.
    """
    require()
    check.rng(rng)
    normals: Tensor = torch.ops.eqr_kernels.philox_normal.default(rng, stream, numel)
    return normals


@register_fake("philox_words")
def _(rng: Tensor, stream: int, numel: int) -> Tensor:
    check.rng(rng)
    return rng.new_empty((rng.shape[0], numel))


@register_fake("philox_normal")
def _(rng: Tensor, stream: int, numel: int) -> Tensor:
    check.rng(rng)
    return rng.new_empty((rng.shape[0], numel), dtype=torch.float32)
