"""One outer step of one trajectory: H_cycles latent recursions, each L_cycles updates of z_L and one of z_H.

Every phase writes scratch space that the next one reads, so that a barrier stands between any two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from eqr_kernels.backends.triton.kernels.attention import attend, project_qkv
from eqr_kernels.backends.triton.kernels.channel_mixer import add_product, gate_up, normalise_features
from eqr_kernels.backends.triton.kernels.damped_update import damped_update, own
from eqr_kernels.backends.triton.kernels.token_mixer import mix_tokens, normalise_tokens, token_down, token_gate_up

# The products as functions that are called: that frees registers, but makes the compiler run Hopper's matrix
# instructions (wgmma) one at a time. Plan.calls chooses.
add_product_called = triton.jit(add_product.fn, noinline=True)
attend_called = triton.jit(attend.fn, noinline=True)
gate_up_called = triton.jit(gate_up.fn, noinline=True)
mix_tokens_called = triton.jit(mix_tokens.fn, noinline=True)
project_qkv_called = triton.jit(project_qkv.fn, noinline=True)
token_down_called = triton.jit(token_down.fn, noinline=True)
token_gate_up_called = triton.jit(token_gate_up.fn, noinline=True)


@triton.jit
def mix(
    u: tl.tensor,
    h: tl.tensor,
    a: tl.tensor,
    squares: tl.tensor,
    mixer_in: tl.tensor,
    mixer_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    norm_eps: tl.tensor,
    p: tl.constexpr,
) -> None:
    """The first half of a block, in place: u [S, width], h [p.work] in the compute dtype; a float32 [S, width], squares
    float32 [squares_size]. The weights as in `mix_tokens` or `project_qkv`; mixer_out [width, width] with attention.
    """
    if p.heads:
        out = h + p.S * p.qkv
        if p.calls:
            project_qkv_called(u, mixer_in, cos, sin, h, p)
        else:
            project_qkv(u, mixer_in, cos, sin, h, p)
        tl.debug_barrier()
        if p.calls:
            attend_called(h, out, p)
        else:
            attend(h, out, p)
        tl.debug_barrier()
        if p.calls:
            add_product_called(out, mixer_out, u, a, squares, p.width, p.inner, p)
        else:
            add_product(out, mixer_out, u, a, squares, p.width, p.inner, p)
        tl.debug_barrier()
        normalise_features(a, squares, u, norm_eps, p)
    elif p.one_pass:
        if p.calls:
            mix_tokens_called(u, mixer_in, mixer_out, norm_eps, p)
        else:
            mix_tokens(u, mixer_in, mixer_out, norm_eps, p)
    else:
        if p.calls:
            token_gate_up_called(u, mixer_in, h, p)
        else:
            token_gate_up(u, mixer_in, h, p)
        tl.debug_barrier()
        if p.calls:
            token_down_called(h, mixer_out, u, a, squares, p)
        else:
            token_down(h, mixer_out, u, a, squares, p)
        tl.debug_barrier()
        normalise_tokens(a, squares, u, norm_eps, p)
    tl.debug_barrier()


@triton.jit
def mix_features(
    u: tl.tensor,
    h: tl.tensor,
    a: tl.tensor,
    squares: tl.tensor,
    gate_up_weight: tl.tensor,
    down: tl.tensor,
    p: tl.constexpr,
) -> None:
    """The second half of a block up to its norm: u, h, a, squares as in `mix`; gate_up_weight [2 hidden, width], down
    [width, hidden]."""
    if p.calls:
        gate_up_called(u, gate_up_weight, h, p)
    else:
        gate_up(u, gate_up_weight, h, p)
    tl.debug_barrier()
    if p.calls:
        add_product_called(h, down, u, a, squares, p.hidden, p.tile.inner, p)
    else:
        add_product(h, down, u, a, squares, p.hidden, p.tile.inner, p)
    tl.debug_barrier()


@triton.jit
def outer_step(
    z: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    a: tl.tensor,
    squares: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    embedding: tl.tensor,
    mixer_in: tl.tensor,
    mixer_out: tl.tensor,
    gate_up_weight: tl.tensor,
    down: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    t: tl.tensor,
    quantum: tl.tensor,
    breadth: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
    layers: tl.tensor,
    lambda_: tl.tensor,
    noise_scale: tl.tensor,
    norm_eps: tl.tensor,
    p: tl.constexpr,
) -> tl.tensor:
    """Outer step number `step` of trajectory t: from the states in the buffers number step % 2 to those in the others.

    z, u, a, squares, quantum, tokens, ids, embedding, seed: as in `damped_update`; u holds the sum that the first
    module starts from, and at the end that of the next outer step. h: [programs, work] in the compute dtype, as are the
    weights of all layers: mixer_in and mixer_out as in `mix`, gate_up_weight [layers, 2 hidden, width], down [layers,
    width, hidden]. cos, sin: float32 [S, head_dim].

    Returns:
        The sums over both states of (z - z before)^2 and of z^2, float32.
    """
    u_own = own(u, p.S * p.width)
    h_own = own(h, p.work)
    a_own = own(a, p.S * p.width)
    squares_own = own(squares, p.squares_size)
    change = 0.0
    length = 0.0
    for m in range(0, p.updates):
        layer = 0
        while layer < layers:
            if layer > 0:
                normalise_features(a_own, squares_own, u_own, norm_eps, p)
                tl.debug_barrier()
            mix(
                u_own,
                h_own,
                a_own,
                squares_own,
                mixer_in + layer * p.mixer_in_size,
                mixer_out + layer * p.mixer_out_size,
                cos,
                sin,
                norm_eps,
                p,
            )
            mix_features(
                u_own,
                h_own,
                a_own,
                squares_own,
                gate_up_weight + layer * (2 * p.hidden * p.width),
                down + layer * (p.width * p.hidden),
                p,
            )
            layer += 1
        more_change, more_length = damped_update(
            a,
            squares,
            z,
            u,
            tokens,
            ids,
            embedding,
            t,
            quantum,
            breadth,
            seed,
            step,
            m,
            lambda_,
            noise_scale,
            norm_eps,
            p,
        )
        change += more_change
        length += more_length
        tl.debug_barrier()
    return change, length
