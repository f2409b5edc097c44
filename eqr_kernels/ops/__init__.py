"""The compiled ops, `torch.ops.eqr_kernels.*`: a file an op, with its call, its fake kernel and what a fake must check.

`import eqr_kernels.ops` works without the compiled extension; `extension_status` says whether it is there, and if not,
why. The ops have no autograd formula: they serve inference, and those of training bring their own gradients.
"""

from eqr_kernels.ops.adam_atan2 import adam_atan2_
from eqr_kernels.ops.damped_update import damped_update
from eqr_kernels.ops.differentiable_step import (
    DifferentiableStepOutput,
    StepRows,
    differentiable_step,
    differentiable_step_backward,
)
from eqr_kernels.ops.fingerprint import fingerprint
from eqr_kernels.ops.fixed_point import FixedPointOutput, StartStates, TurnCells, fixed_point, trajectory_bytes
from eqr_kernels.ops.fixed_point_quantum import Parked, Tables, fixed_point_quantum
from eqr_kernels.ops.latent_recursions import latent_recursions
from eqr_kernels.ops.library import build_info, cpu_isa, cpu_isas, extension_status, set_cpu_isa, why_not_cuda
from eqr_kernels.ops.open_run import Begun, Done, OpenRun, RunCounts, Stepped
from eqr_kernels.ops.operator import Operator, PackedWeights
from eqr_kernels.ops.pack_weights import pack_weights
from eqr_kernels.ops.philox import philox_normal, philox_words
from eqr_kernels.ops.training_step import (
    TrainingBatch,
    TrainingStepOutput,
    scratch_bytes,
    split_gradients,
    training_step,
)

__all__ = [
    "Begun",
    "DifferentiableStepOutput",
    "Done",
    "FixedPointOutput",
    "OpenRun",
    "Operator",
    "PackedWeights",
    "Parked",
    "RunCounts",
    "StartStates",
    "StepRows",
    "Stepped",
    "Tables",
    "TrainingBatch",
    "TrainingStepOutput",
    "TurnCells",
    "adam_atan2_",
    "build_info",
    "cpu_isa",
    "cpu_isas",
    "damped_update",
    "differentiable_step",
    "differentiable_step_backward",
    "extension_status",
    "fingerprint",
    "fixed_point",
    "fixed_point_quantum",
    "latent_recursions",
    "pack_weights",
    "philox_normal",
    "philox_words",
    "scratch_bytes",
    "set_cpu_isa",
    "split_gradients",
    "trajectory_bytes",
    "training_step",
    "why_not_cuda",
]
