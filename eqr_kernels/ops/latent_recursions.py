"""The recursions of an outer step that carry no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from eqr_kernels.ops import checks as check
from eqr_kernels.ops.library import register_fake, require


def latent_recursions(
    packed: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, *, noise_scale: float, count: int
) -> tuple[Tensor, Tensor]:
    """The states after `count` latent recursions, each L_cycles updates of z_L and one of z_H; no gradient.

    For training, which carries a gradient through an outer step's last recursion only (EqR, arXiv 2605.21488, section
    3), and draws its own noise. Rows are independent, and the result does not depend on the number of threads.

    Args:
        packed: uint8 [bytes] of `pack_weights`, of any precision.
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
    check.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale, count)
    check.no_gradient("latent_recursions", "eqr_kernels.reference.latent_recursion", z_H=z_H, z_L=z_L, eps=eps)
    states: tuple[Tensor, Tensor] = torch.ops.eqr_kernels.latent_recursions.default(
        packed, tokens, z_H, z_L, eps, noise_scale, count
    )
    return states


@register_fake("latent_recursions")
def _(
    packed: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, noise_scale: float, count: int
) -> tuple[Tensor, Tensor]:
    check.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale, count)
    return torch.empty_like(z_H), torch.empty_like(z_L)
