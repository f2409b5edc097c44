"""The reference backend's outer steps in CUDA graphs, on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.graphs import CASES, install, solve
from tests.support.models import make_contractive, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch sees"),
]
FIELDS = ("preds", "steps", "restart", "nfe", "all_steps", "all_status", "all_preds")


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_gpu_agrees_with_the_cpu_and_with_eager_steps(puzzles, monkeypatch, options):
    model = make_contractive(tiny_config(noise_scale=0.002))
    want = solve(model, puzzles, **options)
    model, tokens = model.cuda(), puzzles.cuda()
    graphed = solve(model, tokens, **options)
    assert "plain PyTorch in CUDA graphs" in graphed.backend_reason and "eagerly" not in graphed.backend_reason
    install(monkeypatch, lambda device: None)
    eager = solve(model, tokens, **options)
    for field in FIELDS:
        assert torch.equal(getattr(graphed, field), getattr(eager, field)), field
        if options.get("precision") != "bf16":
            assert torch.equal(getattr(graphed, field).cpu(), getattr(want, field)), field
    torch.testing.assert_close(graphed.logits, eager.logits, rtol=1e-5, atol=1e-6)
    tolerance = 0.05 if options.get("precision") == "bf16" else 1e-4
    torch.testing.assert_close(graphed.logits.cpu(), want.logits, rtol=tolerance, atol=tolerance)
    assert graphed.logits.is_cuda


def test_gpu_on_another_stream_and_in_inference_mode(contractive, puzzles):
    model, tokens = contractive.cuda(), puzzles.cuda()
    want = solve(model, tokens, slots=5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        got = solve(model, tokens, slots=5)
    stream.synchronize()
    assert torch.equal(got.preds, want.preds) and torch.equal(got.all_steps, want.all_steps)


def test_gpu_a_capture_that_fails_leaves_torch_sound(contractive, puzzles):
    model, tokens = contractive.cuda(), puzzles.cuda()
    want = solve(model, tokens)

    class Waits(TorchDispatchMode):
        """What a user's debugging mode may do: look at every product."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::mm":
                result.sum().item()
            return result

    torch.cuda.manual_seed(5)
    drawn = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(5)
    with Waits():
        got = solve(model, tokens)
    assert "outer steps ran eagerly: an outer step cannot be captured" in got.backend_reason
    assert torch.equal(got.preds, want.preds) and torch.equal(got.all_steps, want.all_steps)
    assert torch.equal(torch.randn(4, device="cuda"), drawn), "torch's own generator was disturbed"
    again = solve(model, tokens)
    assert "eagerly" not in again.backend_reason and torch.equal(again.preds, want.preds)


def test_gpu_the_host_waits_once_in_a_step(puzzles):
    model, tokens = make_contractive(tiny_config(noise_scale=0.002)).cuda(), puzzles.cuda()

    def waits(depth: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                solve(model, tokens, halt="none", depth=depth)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(w.message) for w in caught)

    solve(model, tokens, halt="none", depth=4)
    assert waits(24) - waits(14) <= 10


def test_gpu_memory_does_not_grow_with_depth():
    model = make_contractive(tiny_config(seq_len=32, hidden_size=64, noise_scale=0.01)).cuda()
    tokens = torch.ones(64, 32, dtype=torch.long, device="cuda")

    def peak(depth: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        solve(model, tokens, halt="none", depth=depth)
        return torch.cuda.max_memory_allocated()

    peak(8)
    assert peak(128) <= peak(8) + (1 << 16)
