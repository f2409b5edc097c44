"""What a process holds does not grow with the calls that it has made: a server makes them for months."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.support.environment import REPOSITORY

CALLS = {
    "solve": "lambda: model.solve(tokens, depth=1)",
    "pack": "lambda: PackArguments.of(model).pack(Precision.fp32)",
    "submit": "lambda: engine.submit(tokens).result()",
    "fingerprint": "lambda: ops.fingerprint(weights)",
}
# As malloc counts it, not as pages: what stays of a call may be some ten bytes.
SCRIPT = """
import ctypes, gc, sys, torch
sys.path.insert(0, {repository!r})
from eqr_kernels import Engine, ops
from eqr_kernels.backends.packing import PackArguments
from eqr_kernels.precision import Precision
from tests.support.models import make_contractive, tiny_config
NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts
def in_use():
    gc.collect()
    counts = mallinfo()
    return counts.uordblks + counts.hblkhd
torch.set_num_threads(1)
model = make_contractive(tiny_config())
weights = [weight.detach() for weight in model.parameters()]
tokens = torch.ones(1, 6, dtype=torch.long)
with Engine(model, depth=1, backend="cpu") as engine:
    call = {call}
    for _ in range(300):
        call()
    before = in_use()
    for _ in range(1500):
        call()
    print((in_use() - before) / 1500)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_stays_of_a_call(name):
    script = SCRIPT.format(repository=str(REPOSITORY), call=CALLS[name])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 16  # bytes; a string alone is 32 and what malloc adds
