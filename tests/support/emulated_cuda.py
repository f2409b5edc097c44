"""The CUDA kernels on the host (tests/cuda/emulator), as a backend that `solve` can run; no GPU is needed.

`EmulatedCuda` runs a kernel's own body, every CUDA thread of it as a fiber; what it gives to the recorder is what the
backend "cuda" gets from a device.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from eqr_kernels.backends import FixedPointProblem, Recorder, Snapshot
from eqr_kernels.backends.base import Proceed
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.precision import Precision
from eqr_kernels.reasoner import EquilibriumReasoner
from eqr_kernels.run_rules import HALTING_RULES
from tests.support.native import build

KERNELS = ("throughput_mma", "throughput_wgmma", "latency")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels as a shared library, built in build/cuda-library where something has changed."""
    folder = build("cuda/emulator", "cuda-library", "-DEQR_RACES=OFF", target="eqr_cuda_emulated")
    loaded = ctypes.CDLL(str(folder / "libeqr_cuda_emulated.so"))
    loaded.eqr_emulated_fixed_point.restype = ctypes.c_char_p
    return loaded


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def _integers(*values: int) -> ctypes.Array:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


class EmulatedCuda:
    """A backend with one kernel on the host, in bf16 whatever the precision asked for.

    Args:
        kernel: one of KERNELS.
        slots: CTAs of the throughput kernels. ctas: those of the latency kernel. cluster: of throughput_wgmma.
        schedule: which threads go on first, and how late what is asynchronous happens.
        quantum: outer steps of a trajectory in a launch; 0: one launch takes each to its end.
    """

    name = "emulated_cuda"
    precisions = tuple(Precision)

    def __init__(
        self, kernel: str, slots: int = 2, ctas: int = 3, cluster: int = 1, schedule: int = 0, quantum: int = 0
    ) -> None:
        self.kernel, self.how = kernel, _integers(slots, ctas, cluster, schedule, quantum)

    def why_not(self, model: EquilibriumReasoner, precision: Precision) -> str | None:
        return None

    def describe(self, model: EquilibriumReasoner, precision: Precision) -> str:
        return f"{self.kernel} on the host"

    def fixed_point(
        self, model: EquilibriumReasoner, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed
    ) -> None:
        p, c = problem, model.config
        arguments = PackArguments.of(model)
        operator, (*heads, layers) = arguments.operator, arguments.weights
        sizes, constants = _integers(*operator.sizes), (ctypes.c_double * 4)(*operator.constants)
        start = arguments.start or (None, None)
        weights = (*heads, *start, *(tensor for block in layers for tensor in block))
        given = [None if t is None else t.float() for t in weights]
        t, S, V, depths = p.trajectories, c.seq_len, c.vocab_size, len(p.checkpoints)
        end, at = _tables(t, S), _tables(depths, t, S)
        logits = torch.full((t, S, V), torch.nan)
        residuals = torch.full((t, p.depth), torch.nan) if p.trace else None
        control = torch.zeros(3, dtype=torch.int64)
        if not proceed(0, 0):
            control[0] = 1
        halt = int(HALTING_RULES[p.halt])
        rules = _integers(p.tokens.shape[0], p.breadth, p.depth, p.seed, halt, p.patience, int(p.race), p.window)
        tokens, ids = p.tokens.contiguous(), p.ids.contiguous()
        error = library().eqr_emulated_fixed_point(
            self.kernel.encode(),
            sizes,
            constants,
            _pointers(given),
            _pointer(tokens),
            _pointer(ids),
            rules,
            ctypes.c_double(p.tol),
            ctypes.c_double(p.noise_scale),
            _integers(*p.checkpoints),
            ctypes.c_int64(depths),
            _pointers(end),
            _pointers(at),
            _pointer(logits),
            _pointer(residuals),
            _pointer(control),
            self.how,
        )
        assert error is None, error.decode()
        number = torch.arange(t)
        for i, depth in enumerate(p.checkpoints):
            preds, *fields = (table[i] for table in at)
            recorder.checkpoint(depth, Snapshot(number, preds, None, *fields))
        if residuals is not None:
            recorder.residual(number[:, None], torch.arange(p.depth), residuals)
        preds, *fields = end
        recorder.finished(Snapshot(number, preds, logits, *fields))
        proceed(int(control[1]), int(control[2]))


def _tables(*sizes: int) -> list[Tensor]:
    """preds [..., S], q_halt, residual, score, steps, status [...]: with what no run writes."""
    *rows, _ = sizes
    integers = [torch.full(shape, -99, dtype=torch.int64) for shape in (sizes, rows, rows)]
    q_halt, residual, score = (torch.full(rows, torch.nan) for _ in range(3))
    return [integers[0], q_halt, residual, score, integers[1], integers[2]]
