"""The recursions of an outer step that carry no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require
from eqr_kernels.ops.operator import PackedWeights


def latent_recursions(
    packed: PackedWeights,
    tokens: Tensor,
    z_H: Tensor,
    z_L: Tensor,
    eps: Tensor | None,
    *,
    noise_scale: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The states after `count` latent recursions, each L_cycles updates of z_L and one of z_H; no gradient.

    For training, which carries a gradient through an outer step's last recursion only (EqR, arXiv 2605.21488, section
    3), and draws its own noise. Rows are independent, and the result does not depend on the number of threads.

    Args:
        packed: of any precision.
        tokens: int64 [n, S] in 0..V-1. z_H, z_L: float32 [n, S, d]. All contiguous and on CPU.
        eps: float32 [at least count * (L_cycles + 1), n, S, d], the noise of each update; or None.
        noise_scale: what `eps` is multiplied with.
        count: 0 to 254.

    Returns:
        z_H, z_L: float32 [n, S, d].

    Raises:
        RuntimeError: there is no extension, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above.
    """
    require()
    _check(packed.data, tokens, z_H, z_L, eps)
    check.no_gradient("latent_recursions", "eqr_kernels.reference.latent_recursion", z_H=z_H, z_L=z_L, eps=eps)
    states: tuple[Tensor, Tensor] = torch.ops.eqr_kernels.latent_recursions.default(
        packed.data, tokens, z_H, z_L, eps, noise_scale, count
    )
    return states


def _check(packed: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None) -> None:
    check.packed(packed)
    check.tensor("tokens", tokens, torch.int64, ("n", "S"))
    n, length = tokens.shape
    check.tensor("z_H", z_H, torch.float32, (n, length, "d"))
    check.tensor("z_L", z_L, torch.float32, (n, length, z_H.shape[2]))
    if eps is not None:
        check.tensor("eps", eps, torch.float32, ("updates", n, length, z_H.shape[2]))


@register_fake("latent_recursions")
def _(
    packed: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, noise_scale: float, count: int
) -> tuple[Tensor, Tensor]:
    _check(packed, tokens, z_H, z_L, eps)
    return torch.empty_like(z_H), torch.empty_like(z_L)
