"""Training steps on a GPU, which the host must not wait for."""

from __future__ import annotations

import pytest
import torch

from eqr_kernels import EquilibriumReasoner
from eqr_kernels.training.settings import TrainSettings
from eqr_kernels.training.trainer import Trainer
from tests.support.models import tiny_config
from tests.support.training import make_stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch sees"),
]


def make_cuda_trainer(device: str = "cuda", **changes: object) -> Trainer:
    torch.manual_seed(0)
    model = EquilibriumReasoner(tiny_config(noise_scale=0.01, halt_max_steps=3)).to(device)
    settings = dict(batch_size=8, lr=3e-3, lr_warmup_steps=2, total_steps=None, compile=False) | changes
    return Trainer(model, make_stream(curriculum=()), TrainSettings(**settings))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_a_training_step_never_waits(dtype, compile):
    trainer = make_cuda_trainer(forward_dtype=dtype, compile=compile)
    assert trainer.prefetcher is not None
    for _ in range(2):  # compiles, and loads libraries
        trainer.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):  # every row is replaced at least once
            trainer.train_step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            trainer.report()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 8 and 0 < trainer.report().loss < 100
    trainer.close()


def test_gpu_rows_get_the_puzzles_that_they_get_on_the_cpu():
    gpu, cpu = make_cuda_trainer(), make_cuda_trainer("cpu", prefetch=True)
    for _ in range(4):
        cpu.rows.halted = gpu.rows.halted.cpu()
        gpu.train_step()
        cpu.train_step()
        assert torch.equal(gpu.rows.tokens.cpu(), cpu.rows.tokens)
        assert torch.equal(gpu.rows.labels.cpu(), cpu.rows.labels)
    for trainer in (gpu, cpu):
        trainer.close()
