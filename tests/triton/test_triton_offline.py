"""What the Triton kernel becomes on sm_80 and sm_90, compiled without a GPU: fit, spills, tensor-core instructions.

Each case compiles in a child process, which must not interpret, through the same arguments as a launch. By default the
first choice of each preset; EQR_TEST_ALL_TILES=1 compiles all candidates, which takes many minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.backends.base import FixedPointProblem
from eqr_kernels.backends.triton.plan import candidates, prefers_calls
from eqr_kernels.precision import Precision

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux", reason="needs Triton: pip install triton"
)

PRESETS = {"sudoku-paper": EqRConfig.sudoku_paper(), "sudoku-small": EqRConfig.sudoku_small(), "maze": EqRConfig.maze()}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED = {80: 166912, 90: 232448}  # bytes that a program may have
ATTENTION = ("maze", "bf16", 90)
all_tiles = pytest.mark.skipif(
    os.environ.get("EQR_TEST_ALL_TILES") != "1", reason="many minutes of compiling: set EQR_TEST_ALL_TILES=1"
)


def cases() -> list[Any]:
    params = []
    for preset, config in PRESETS.items():
        for precision, dtype in DTYPES.items():
            for i in range(len(candidates(config, dtype))):
                for architecture in SHARED:
                    first = i == 0 and (preset == "sudoku-paper" or (preset, precision, architecture) == ATTENTION)
                    name = f"{preset}, {precision}, candidate {i}, sm_{architecture}"
                    marks = () if first else all_tiles
                    params.append(pytest.param(preset, precision, i, architecture, id=name, marks=marks))
    return params


def compiled(preset: str, precision: str, index: int, architecture: int, folder: Path) -> dict[str, Any]:
    """Resources and counts of instructions, from a child process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, preset, precision, str(index), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "precision", "index", "architecture"), cases())
def test_fits_and_uses_tensor_cores(preset, precision, index, architecture, tmp_path):
    result = compiled(preset, precision, index, architecture, tmp_path)
    assert result["shared"] <= SHARED[architecture] and result["registers"] <= 255, result
    assert result["same_for_other_numbers"], "a compilation must not depend on the numbers of a solve"
    counts = result["counts"]
    if precision == "fp32":
        assert counts["HMMA"] == counts["HGMMA"] == 0, "float32 products must not be rounded to tf32"
    elif architecture == 80:
        assert counts["HMMA"] > 100
    else:
        assert counts["HGMMA"] > 30
        # After a call, or in a function that is called, ptxas waits for each wgmma before the next.
        assert counts["WARPGROUP.DEPBAR"] < counts["HGMMA"] / 2, "the wgmma instructions are serialised"
    if index == 0:
        # What is spilled are addresses, outside of the products' loops. Triton before 3.9 unrolls more; in fp32 ptxas
        # keeps to 128 registers, so that two programs run on a multiprocessor.
        allowed = 0 if precision == "bf16" and tuple(result["triton"]) >= (3, 9) else 256
        assert result["stack"] <= allowed and (allowed or counts["LDL"] == counts["STL"] == 0), result


ABSENT = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
class Absent:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0
driver.set_active(Absent())
from eqr_kernels.ops.triton.damped_update import _sum, _update
rng, sums = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(2, 4, 3)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    z = torch.zeros(4, 3000, dtype=dtype)
    for measures in (True, False):
        _update.warmup(z, z, z, rng, z, sums, 3000, 3, 2, 0.9, 0.1, measures, 1024, enable_fp_fusion=True, grid=(12,))
    _update.warmup(z, z, z, rng, z, sums, 1, 1, 2, 1.0, 0.0, True, 16, enable_fp_fusion=True, grid=(4,))
_sum.warmup(sums, sums, 3, 1024, enable_fp_fusion=True, grid=(8,))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_the_update_of_rows_compiles(architecture, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ABSENT, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_here(preset: str, precision: str, index: int, architecture: int) -> dict[str, Any]:
    """Compiles for a GPU that is not there. In the child."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from eqr_kernels.backends.triton import launch
    from eqr_kernels.backends.triton.kernels.fixed_point import fixed_point

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Absent())
    model, dtype = EquilibriumReasoner(PRESETS[preset]), DTYPES[precision]
    capability = divmod(architecture, 10)
    plan = candidates(model.config, dtype, calls=prefers_calls(capability, dtype))[index]

    def kernel(**changes: Any) -> Any:
        problem: dict[str, Any] = dict(
            tokens=torch.ones(3, model.config.seq_len, dtype=torch.int64),
            ids=torch.arange(3),
            seed=0,
            breadth=1,
            depth=1,
            halt="none",
            tol=0.0,
            patience=1,
            window=1,
            noise_scale=0.0,
            select="residual",
            checkpoints=(),
            slots=1,
            trace=False,
            precision=Precision[precision],
        )
        with torch.no_grad():
            changed = FixedPointProblem(**{**problem, **changes})
            values, _ = launch.arguments(model, changed, plan, torch.zeros(3, dtype=torch.int64), changed.slots)
        return fixed_point.warmup(**values, **launch.compile_options(plan), grid=(1,))

    first = kernel()
    # Tokens that begin 8 bytes after a multiple of 16.
    tokens = torch.ones(17 * model.config.seq_len + 1, dtype=torch.int64)[1:].view(17, model.config.seq_len)
    second = kernel(
        tokens=tokens,
        ids=torch.arange(18)[1:],
        seed=2**32 - 1,
        breadth=16,
        depth=2**24 - 1,
        halt="residual",
        tol=0.5,
        patience=7,
        window=32,
        noise_scale=0.5,
        select="first",
        checkpoints=(16, 32),
        slots=4,
    )

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(first.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tools / "cuobjdump"), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    names = ("HMMA", "HGMMA", "WARPGROUP.DEPBAR", "LDL", "STL")
    return {
        "triton": [int(part) for part in triton.__version__.split(".")[:2]],
        "shared": first.metadata.shared,
        "registers": max(int(n) for n in re.findall(r"REG:(\d+)", usage)),
        "stack": max(int(n) for n in re.findall(r"STACK:(\d+)", usage)),
        "counts": {name: len(re.findall(rf"\b{re.escape(name)}\b", sass)) for name in names},
        "same_for_other_numbers": first is second,
    }


if __name__ == "__main__":
    print(json.dumps(compile_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
