"""The compiled ops, `torch.ops.eqr_kernels.*`: checks, fake kernels and what to do when they are not there.

`import eqr_kernels.ops` works without the compiled extension; `extension_status` tells whether it is there, and if not,
why. The ops have no autograd formula: they serve inference.
"""

from __future__ import annotations

import importlib.machinery
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eqr_kernels import _op_checks as check

DISABLE = "EQR_DISABLE_EXTENSION"
_REMEDY = "build it with `pip install --no-build-isolation .` in the source folder, beside the torch you use"
_NOTE = Path(__file__).with_name("_no_extension.txt")


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get(DISABLE, "0").strip() not in ("", "0"):
        return None, f"the compiled extension is switched off by {DISABLE}={os.environ[DISABLE]}; unset it to use it"
    # In this folder and nowhere else: the hook of an editable install would find another copy's.
    if importlib.machinery.PathFinder.find_spec("eqr_kernels._C", [str(Path(__file__).parent)]) is None:
        note = _NOTE.read_text().strip() if _NOTE.is_file() else "eqr_kernels._C has not been built"
        return None, f"{note}; {_REMEDY}"
    try:
        # torch's libraries are loaded by now, which is how this one finds their symbols.
        from eqr_kernels import _C
    except ImportError as error:
        reason = f"eqr_kernels._C was built but does not load with torch {torch.__version__} ({error}); {_REMEDY}"
        warnings.warn(f"eqr_kernels runs without its compiled extension: {reason}", RuntimeWarning, stacklevel=3)
        return None, reason
    info = _C.build_info()
    return _C, f"eqr_kernels._C {info['version']}, built by {info['compiler']} with torch {info['torch_headers']}"


_extension, _status = _load()


def extension_status() -> tuple[bool, str]:
    """Whether the compiled extension is loaded, and what it is or why it is not."""
    return _extension is not None, _status


def _require() -> Any:
    if _extension is None:
        raise RuntimeError(f"this needs the compiled extension: {_status}; or use backend='reference'")
    return _extension


def _require_cuda(tensor: Tensor) -> None:
    """That the extension has kernels for the device of a tensor, where that is a CUDA device."""
    if isinstance(tensor, Tensor) and tensor.device.type == "cuda" and (why_not := why_not_cuda()):
        raise RuntimeError(why_not)


def why_not_cuda() -> str | None:
    """Why the extension has no CUDA kernels, with the remedy; None where it has them."""
    if _extension is None:
        return _status
    if _extension.build_info()["cuda"] is None:
        return (
            "eqr_kernels._C was built without CUDA kernels; put nvcc of the CUDA toolkit on PATH (or set CUDACXX) and "
            "run `EQR_BUILD_CUDA=ON pip install --no-build-isolation .` in the source folder"
        )
    return None


def build_info() -> dict[str, Any]:
    """What the extension was built with: version, compiler, build_type, torch_headers, torch_target, avx512, cuda and
    cuda_architectures (None without CUDA kernels).

    Raises:
        RuntimeError: there is no extension.
    """
    return dict(_require().build_info())


def cpu_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use here, best last: of portable, avx2, avx512, avx512_bf16.

    Raises:
        RuntimeError: there is no extension.
    """
    return list(_require().cpu_isas())


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: the best, or what EQR_CPU_ISA or `set_cpu_isa` asked for.

    Raises:
        RuntimeError: there is no extension.
        ValueError: EQR_CPU_ISA names an instruction set that is not available.
    """
    return str(_require().cpu_isa())


def set_cpu_isa(name: str) -> None:
    """Chooses the instruction set of the CPU kernels, for the whole process.

    Raises:
        RuntimeError: there is no extension.
        ValueError: `name` is not one of `cpu_isas()`.
    """
    _require().set_cpu_isa(name)


def damped_update(
    z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state update of one module application, in one pass: out = (1 - lambda_) z + lambda_ u + noise_scale eps.

    eps are the standard normals of (`rng`, `stream`) as `eqr_kernels.noise.normal` defines them (equal to rounding, the
    words behind them bit for bit), drawn inside. All arithmetic is in float32, with one rounding to the dtype of z. The
    result does not depend, bit for bit, on the number of threads, on the instruction set or on the other rows.

    Args:
        z, u: [n, S, d] contiguous, float32 or bfloat16, the same for both.
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.
        lambda_, noise_scale: finite; noise_scale >= 0, and 0 draws nothing.
        z_prev: like z, the state to measure the residual against, or None.

    Returns:
        out, like z; with z_prev also diff_sq and norm_sq, float32 [n]: sum (out - z_prev)^2 and sum out^2 over the
        rounded out, accumulated in float32 in a fixed order; else both are of shape [0]. Values that are not finite
        pass through, each in its own row.

    Raises:
        RuntimeError: there is no extension, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above.
    """
    _require()
    check.damped_update(z, u, rng, stream, lambda_, noise_scale, z_prev)
    check.no_gradient("damped_update", "eqr_kernels.reference.damped_update to train", z=z, u=u, z_prev=z_prev)
    for name, tensor in (("z", z), ("u", u), ("z_prev", z_prev)):
        if tensor is not None:
            check.on_cpu(name, tensor)
    out, diff_sq, norm_sq = torch.ops.eqr_kernels.damped_update.default(z, u, rng, stream, lambda_, noise_scale, z_prev)
    return out, diff_sq, norm_sq


def philox_words(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` random words of each row's stream, as `eqr_kernels.noise.philox_words`: int64 [n, numel].

    Args:
        rng: [n, 4] int64: (seed, restart, id, step) of each row.
        stream: 0..255.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is out of range.
    """
    _require()
    check.rng_and_stream(rng, stream)
    words: Tensor = torch.ops.eqr_kernels.philox_words.default(rng, stream, numel)
    return words


def philox_normal(rng: Tensor, stream: int, numel: int) -> Tensor:
    """The first `numel` standard normals of each row's stream, as `damped_update` draws them: float32 [n, numel].

    Arguments and errors are those of `philox_words`.
    """
    _require()
    check.rng_and_stream(rng, stream)
    normals: Tensor = torch.ops.eqr_kernels.philox_normal.default(rng, stream, numel)
    return normals


class FixedPointOutput(NamedTuple):
    """What `fixed_point` gives: N puzzles, T = N * breadth trajectories, C checkpoints, S tokens, V vocabulary.

    Trajectory t is restart t % breadth of puzzle t // breadth. A status is a number of `eqr_kernels.Status`; at a
    checkpoint, -1 is a trajectory that was still going. One that ended before a checkpoint is there as it ended.
    """

    logits: Tensor  # float32 [N, S, V], the winner's
    winner: Tensor  # int64 [N], the restart that `select` chooses
    preds: Tensor  # int64 [T, S]
    q_halt: Tensor  # float32 [T]
    residual: Tensor  # float32 [T]
    score: Tensor  # float32 [T]
    steps: Tensor  # int64 [T]
    status: Tensor  # int64 [T]
    at_preds: Tensor  # int64 [C, T, S]
    at_q_halt: Tensor  # float32 [C, T]
    at_residual: Tensor  # float32 [C, T]
    at_score: Tensor  # float32 [C, T]
    at_steps: Tensor  # int64 [C, T]
    at_status: Tensor  # int64 [C, T]
    residuals: Tensor  # float32 [T, depth] with trace, NaN after a trajectory's end; else [0]


def pack_weights(
    embedding: Tensor,
    lm_head: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    blocks: Sequence[Tensor],
    rope_cos: Tensor | None,
    rope_sin: Tensor | None,
    H_start: Tensor | None,
    L_start: Tensor | None,
    sizes: Sequence[int],
    constants: Sequence[float],
    precision: str,
    layout: str = "",
) -> Tensor:
    """The weights of an operator in the order in which `fixed_point` reads them, for the instruction set in use.

    S tokens, d features, V vocabulary, k(m) hidden units of the SwiGLU on an axis of m, h heads. All tensors are
    float32, contiguous and on CPU, or all on one CUDA device, which packs them in the order of its current stream;
    "bf16" and "int8" round here.

    Args:
        embedding, lm_head: [V, d]. q_weight: [2, d]. q_bias: [2].
        blocks: for each layer mixer_in ([2 k(S), S], gate rows first; with attention [3 d, d]: q, k and v heads),
            mixer_out ([S, k(S)]; with attention [d, d]), gate_up [2 k(d), d] (gate rows first) and down [d, k(d)].
        rope_cos, rope_sin: [S, d / h], or None.
        H_start, L_start: [d], the start state of every token, or None for random ones.
        sizes: tokens, features, vocabulary, mixer_hidden (k(S); 0 with attention), hidden (k(d)), heads (0 without
            attention), layers, H_cycles, L_cycles, rope_parts (0: no rotation; 1: of whole heads; 2: of their halves).
        constants: lambda_, rms_norm_eps, H_init_std, L_init_std.
        precision: "fp32"; "bf16" (operands, with float32 sums and state); "int8" (channel GEMMs, the rest as "bf16").
            On a CUDA device "bf16".
        layout: on a CUDA device the kernel that is to read them: "throughput_mma", "throughput_wgmma" or "latency".
            Without meaning on CPU.

    Returns:
        uint8 [bytes], good on this machine and for this instruction set or layout only.

    Raises:
        RuntimeError: there is no extension, or none for this device, or a gradient is asked for.
        TypeError, ValueError: an argument is not as above, or the CUDA kernels do not take the operator.
    """
    _require()
    _require_cuda(embedding)
    optional = (rope_cos, rope_sin, H_start, L_start)
    check.pack_weights(embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision)
    named = dict(embedding=embedding, lm_head=lm_head, q_weight=q_weight, q_bias=q_bias)
    named |= {f"blocks[{i}]": tensor for i, tensor in enumerate(blocks)}
    check.no_gradient("pack_weights", "backend='reference'", **named, H_start=H_start, L_start=L_start)
    packed: Tensor = torch.ops.eqr_kernels.pack_weights.default(
        embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision, layout
    )
    return packed


def fixed_point(
    packed: Tensor,
    tokens: Tensor,
    ids: Tensor,
    control: Tensor,
    *,
    sizes: Sequence[int],
    constants: Sequence[float],
    fixed_start: bool,
    seed: int,
    breadth: int,
    depth: int,
    halt: str,
    tol: float,
    patience: int,
    select: str,
    window: int,
    noise_scale: float,
    checkpoints: Sequence[int] = (),
    slots: int,
    trace: bool = False,
    ask: Callable[[], object] | None = None,
) -> FixedPointOutput:
    """Iterates T = N * breadth trajectories, each to its end, in one call on torch's threads or on a CUDA device.

    The rules are those of `eqr_kernels.solve.solve`. The result does not depend, bit for bit, on the number of threads,
    on `slots` or on the other rows, but for the steps and status of the losers of a race.

    On a CUDA device the op only enqueues the run on the current stream and returns; it may be captured in a graph.

    Args:
        packed: uint8 [bytes] of `pack_weights`, for the instruction set or the layout that it was packed with.
        tokens: int64 [N, S] in 0..V-1 (on a CUDA device one out of range ends all work there, as with torch's own
            indexing). ids: int64 [N], key the random stream. All contiguous, and all on CPU or on one CUDA device.
        control: int64 [3], zeros; written while the op runs, and readable and writable from another thread: [0] cancels
            what is left when it is not 0, [1] counts the trajectories that have ended, [2] the outer steps spent. For
            a run on a CUDA device in page-locked memory (`pin_memory=True`), or on the device where nobody looks at it;
            its counts may then come out of order.
        sizes, constants: those of `pack_weights`. fixed_start: whether it was given H_start.
        seed: 0 to 2**32 - 1.
        breadth, depth: trajectories of each puzzle, and outer steps of each at most.
        halt, tol, patience: "residual" (residual <= tol for `patience` consecutive steps), "q" or "none".
        select: "residual", "vote", "q" or "first".
        window: differences of the logits in a score.
        noise_scale: of the noise injection; 0 draws none.
        checkpoints: rising depths at which all trajectories are also recorded; at most 64 on a CUDA device.
        slots: trajectories in flight at most.
        trace: also return every residual.
        ask: called now and then from this thread while the op runs; returning False cancels what is left. On CPU only.

    Raises:
        RuntimeError: there is no extension, or none for this device.
        TypeError, ValueError: an argument is not as above.
        BaseException: whatever `ask` or the handler of a signal raised (KeyboardInterrupt on Ctrl-C) once the op has
            stopped, which takes an outer step. Not under torch.compile, where the op runs to its end.
    """
    extension = _require()
    _require_cuda(tokens)
    check.fixed_point(
        packed,
        tokens,
        ids,
        control,
        sizes,
        constants,
        seed,
        breadth,
        depth,
        halt,
        tol,
        patience,
        select,
        window,
        noise_scale,
        checkpoints,
        slots,
    )

    def run() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.eqr_kernels.fixed_point.default(
            packed,
            tokens,
            ids,
            control,
            sizes,
            constants,
            fixed_start,
            seed,
            breadth,
            depth,
            halt,
            tol,
            patience,
            select,
            window,
            noise_scale,
            checkpoints,
            slots,
            trace,
        )
        return result

    on_cpu = tokens.device.type == "cpu"
    if ask is not None and not on_cpu:
        raise ValueError("ask is for runs on CPU: on a CUDA device the op returns at once; look at control meanwhile")
    return FixedPointOutput(*(extension.with_poll(run, ask) if on_cpu and not torch.compiler.is_compiling() else run()))


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
    _require()
    check.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale, count)
    check.no_gradient("latent_recursions", "eqr_kernels.reference.latent_recursion", z_H=z_H, z_L=z_L, eps=eps)
    states: tuple[Tensor, Tensor] = torch.ops.eqr_kernels.latent_recursions.default(
        packed, tokens, z_H, z_L, eps, noise_scale, count
    )
    return states


def trajectory_bytes(packed: Tensor, window: int = 3) -> int:
    """Bytes that one trajectory in flight takes in `fixed_point`: its state, its scratch space and its last scores.

    Args:
        packed: uint8 [bytes] of `pack_weights`.
        window: as in `fixed_point`, 1 to 2**24 - 1.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    _require()
    check.packed(packed)
    return int(torch.ops.eqr_kernels.trajectory_bytes.default(packed, window))


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A 64-bit hash of the bytes, shapes and dtypes of `tensors`, in order: other contents give another number.

    Args:
        tensors: at least one, of any shapes and dtypes, contiguous and on CPU.

    Raises:
        RuntimeError: there is no extension.
        TypeError, ValueError: an argument is not as above.
    """
    _require()
    check.fingerprint(tensors)
    return int(torch.ops.eqr_kernels.fingerprint.default(tensors))


if _extension is not None:

    @torch.library.register_fake("eqr_kernels::damped_update")
    def _(
        z: Tensor, u: Tensor, rng: Tensor, stream: int, lambda_: float, noise_scale: float, z_prev: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        check.damped_update(z, u, rng, stream, lambda_, noise_scale, z_prev)
        rows = 0 if z_prev is None else z.shape[0]
        sums = z.new_empty(rows, dtype=torch.float32)
        return torch.empty_like(z), sums, torch.empty_like(sums)

    @torch.library.register_fake("eqr_kernels::philox_words")
    def _(rng: Tensor, stream: int, numel: int) -> Tensor:
        check.rng_and_stream(rng, stream)
        return rng.new_empty((rng.shape[0], numel))

    @torch.library.register_fake("eqr_kernels::philox_normal")
    def _(rng: Tensor, stream: int, numel: int) -> Tensor:
        check.rng_and_stream(rng, stream)
        return rng.new_empty((rng.shape[0], numel), dtype=torch.float32)

    @torch.library.register_fake("eqr_kernels::pack_weights")
    def _(
        embedding: Tensor,
        lm_head: Tensor,
        q_weight: Tensor,
        q_bias: Tensor,
        blocks: Sequence[Tensor],
        rope_cos: Tensor | None,
        rope_sin: Tensor | None,
        H_start: Tensor | None,
        L_start: Tensor | None,
        sizes: Sequence[int],
        constants: Sequence[float],
        precision: str,
        layout: str = "",
    ) -> Tensor:
        optional = (rope_cos, rope_sin, H_start, L_start)
        check.pack_weights(embedding, lm_head, q_weight, q_bias, blocks, *optional, sizes, constants, precision)
        layout = layout if embedding.device.type == "cuda" else ""
        size = _require().packed_bytes(sizes, constants, H_start is not None, precision, layout)
        return embedding.new_empty(size, dtype=torch.uint8)

    @torch.library.register_fake("eqr_kernels::fixed_point")
    def _(
        packed: Tensor,
        tokens: Tensor,
        ids: Tensor,
        control: Tensor,
        sizes: Sequence[int],
        constants: Sequence[float],
        fixed_start: bool,
        seed: int,
        breadth: int,
        depth: int,
        halt: str,
        tol: float,
        patience: int,
        select: str,
        window: int,
        noise_scale: float,
        checkpoints: Sequence[int],
        slots: int,
        trace: bool,
    ) -> tuple[Tensor, ...]:
        check.fixed_point(
            packed,
            tokens,
            ids,
            control,
            sizes,
            constants,
            seed,
            breadth,
            depth,
            halt,
            tol,
            patience,
            select,
            window,
            noise_scale,
            checkpoints,
            slots,
        )
        puzzles, length, vocabulary = tokens.shape[0], sizes[0], sizes[2]
        trajectories, depths = puzzles * breadth, len(checkpoints)

        def recorded(*sizes: int) -> list[Tensor]:
            preds = tokens.new_empty((*sizes, length))
            of_float = [tokens.new_empty(sizes, dtype=torch.float32) for _ in range(3)]
            return [preds, *of_float, tokens.new_empty(sizes), tokens.new_empty(sizes)]

        logits = tokens.new_empty((puzzles, length, vocabulary), dtype=torch.float32)
        residuals = tokens.new_empty((trajectories, depth) if trace else 0, dtype=torch.float32)
        end, at = recorded(trajectories), recorded(depths, trajectories)
        return logits, tokens.new_empty(puzzles), *end, *at, residuals

    @torch.library.register_fake("eqr_kernels::latent_recursions")
    def _(
        packed: Tensor, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, noise_scale: float, count: int
    ) -> tuple[Tensor, Tensor]:
        check.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale, count)
        return torch.empty_like(z_H), torch.empty_like(z_L)

    @torch.library.register_fake("eqr_kernels::trajectory_bytes")
    def _(packed: Tensor, window: int) -> Tensor:
        check.packed(packed)
        return packed.new_empty((), dtype=torch.int64)

    @torch.library.register_fake("eqr_kernels::fingerprint")
    def _(tensors: Sequence[Tensor]) -> Tensor:
        check.fingerprint(tensors)
        return tensors[0].new_empty((), dtype=torch.int64)
