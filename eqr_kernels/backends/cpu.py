"""The CPU backend: every outer step of every trajectory in one call of the compiled op `fixed_point`."""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from eqr_kernels import ops
from eqr_kernels.backends.base import FixedPointProblem, Proceed, Recorder
from eqr_kernels.backends.packing import PackArguments, wrong_dtype
from eqr_kernels.backends.tables import hand_over
from eqr_kernels.forking import fork_safe_lock
from eqr_kernels.modules import EqROperator
from eqr_kernels.precision import Precision, names
from eqr_kernels.trajectory import FinishedTrajectory, Status


class _Packs:
    """The packed weights of one model: one for each instruction set and precision, good as long as nothing changed."""

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._packs: dict[tuple[str, Precision], tuple[tuple[object, ...], ops.PackedWeights]] = {}

    def get(self, model: EqROperator, precision: Precision) -> ops.PackedWeights:
        # Read whole at every solve: `p.data.copy_` and the like leave no trace but the bytes.
        weights = PackArguments.of(model)
        fingerprint = weights.fingerprint()
        with self._lock:
            isa = ops.cpu_isa()
            key = (isa, precision)
            known = self._packs.get(key)
            if known is not None and known[0] == fingerprint:
                return known[1]
            self._packs.pop(key, None)  # freed before the new one takes its memory
            known = None
            # An inference tensor would be of no use to a later caller outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                packed = weights.pack(precision)
            # Kept only if no other thread changed the weights or the instruction set meanwhile.
            if weights.fingerprint() == fingerprint and ops.cpu_isa() == isa:
                self._packs[key] = (fingerprint, packed)
            return packed


@torch.no_grad()
def latent_recursions(
    model: EqROperator, tokens: Tensor, z_H: Tensor, z_L: Tensor, eps: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """`ops.latent_recursions` in float32 with the model's weights as they are now, packed for this one call."""
    packed = PackArguments.of(model).pack(Precision.fp32)
    z_H, z_L = z_H.contiguous(), z_L.contiguous()
    return ops.latent_recursions(packed, tokens, z_H, z_L, eps, noise_scale=model.config.noise_scale, count=count)


def why_not_cpu(model: EqROperator, precision: Precision) -> str | None:
    """Why the fused CPU kernels cannot run the model in that precision, with the remedy; None where they can."""
    built, reason = ops.extension_status()
    if not built:
        return reason
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.device.type != "cpu":
            return f"weight {name} is on {weight.device}; move the model with model.cpu()"
    if why := wrong_dtype(model):
        return why
    if precision not in CpuBackend.precisions:
        return (
            f"the kernel computes in {names(CpuBackend.precisions)}, not in {precision.name}; choose another precision "
            "or backend='reference'"
        )
    return None


def cpu_threads() -> int:
    """That a run takes: torch's, up to twice the CPUs that the process may use, as in csrc/torch/fixed_point.cpp."""
    return min(torch.get_num_threads(), 2 * len(os.sched_getaffinity(0)))


class CpuBackend:
    """The fused fixed-point kernel, on torch's threads, up to twice the CPUs that the process may use."""

    name = "cpu"
    precisions = (Precision.fp32, Precision.bf16, Precision.int8)
    max_checkpoints: int | None = None
    keeps_states = True
    turns_cells = True
    runs_modules = False

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._packs: WeakKeyDictionary[EqROperator, _Packs] = WeakKeyDictionary()

    def why_not(self, model: EqROperator, precision: Precision) -> str | None:
        return why_not_cpu(model, precision)

    def describe(self, model: EqROperator, precision: Precision) -> str:
        isa, threads = ops.cpu_isa(), cpu_threads()
        many = f"{threads} {'thread' if threads == 1 else 'threads'}"
        description = f"fused fixed-point kernel, {isa} {precision.name}, {many}"
        native = isa in ("avx512_bf16", "amx") and ops.build_info()["avx512"] == "native"
        if precision is not Precision.fp32 and not native:
            integers = "int8 products in 16-bit instructions, " if precision is Precision.int8 else ""
            description += f" ({integers}bf16 operands in fp32 arithmetic: {isa} has no bf16 instructions here)"
        return description

    def packed(self, model: EqROperator, precision: Precision) -> ops.PackedWeights:
        """The model's weights as `ops.fixed_point` takes them, packed anew where they have changed."""
        with self._lock:
            packs = self._packs.setdefault(model, _Packs())
        return packs.get(model, precision)

    @torch.no_grad()
    def fixed_point(self, model: EqROperator, problem: FixedPointProblem, recorder: Recorder, proceed: Proceed) -> None:
        p, control = problem, torch.zeros(3, dtype=torch.int64, device="cpu")
        packed = self.packed(model, p.precision)

        def ask() -> bool:
            _, finished, spent = control.tolist()
            return proceed(finished, spent)

        if not ask():
            control[0] = 1

        def ended(
            puzzle: int,
            restart: int,
            status: int,
            steps: int,
            residual: float,
            score: float,
            q_halt: float,
            preds: list[int],
        ) -> None:
            answer = torch.tensor(preds, device="cpu")
            numbers = (puzzle, restart, Status(status), steps, residual, score, q_halt)
            recorder.ended(FinishedTrajectory(*numbers, answer))

        result = ops.fixed_point(
            packed,
            p.tokens.contiguous(),
            p.ids.contiguous(),
            control,
            p,
            start=p.start,
            keep_states=p.keep_states,
            turns=p.turns,
            ask=ask,
            ended=ended if p.report_ends else None,
        )
        hand_over(result, p, recorder)
        ask()
