"""The order of calls that a CUDA graph takes, with a CUDA that only takes notes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from eqr_kernels.backends.graphed import CudaGraphs, StepOutputs
from tests.support.graphs import inputs, step


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    """What is asked of torch.cuda, in order; a capture fails to end once the note "invalid" is there."""
    notes: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            notes.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool: object, capture_error_mode: str) -> None:
            notes.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            notes.append("end")
            if "invalid" in notes:
                raise RuntimeError("the capture is invalid")

        def replay(self) -> None:
            notes.append("replay")

    class Generator:
        def __init__(self, device: object = None) -> None: ...

        def get_state(self) -> str:
            return "state"

        def set_state(self, state: str) -> None:
            notes.append(f"new generator has the {state}")

        def graphsafe_get_state(self) -> str:
            return "new"

        def graphsafe_set_state(self, state: str) -> None:
            notes.append(f"generator takes the {state}")

    def on(stream: Stream) -> contextlib.AbstractContextManager[None]:
        notes.append(f"on {stream.name}")
        return contextlib.nullcontext()

    fakes = dict(
        Stream=Stream,
        CUDAGraph=Graph,
        stream=on,
        device=lambda device: contextlib.nullcontext(),
        current_stream=lambda: Stream("caller"),
        graph_pool_handle=lambda: "pool",
        current_device=lambda: 0,
        default_generators=(Generator(),),
        is_current_stream_capturing=lambda: "capturing" in notes,
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", Generator)
    ended = lambda device, pool: notes.append(f"allocator leaves {pool}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    return notes


def test_a_capture_is_made_on_the_side_stream(notes):
    graphs = CudaGraphs(torch.device("cuda"))
    graphs.warm_up(lambda: step(inputs(2, 1.0)))
    assert notes == ["side waits for caller", "on side", "caller waits for side"]
    notes.clear()
    replay, outputs = graphs.capture(lambda: step(inputs(2, 1.0)))
    begin = "begin in pool, thread_local"
    assert notes == ["side waits for caller", "on side", begin, "end", "caller waits for side"]
    replay()
    assert notes[-1] == "replay" and len(outputs.z_H) == 2
    assert graphs.why_not() is None
    notes.append("capturing")
    assert graphs.why_not() == "the current stream is itself being captured"


@pytest.mark.parametrize("when", ["in the step", "at the end"])
def test_a_capture_that_fails_is_ended_and_torch_mended(notes, when):
    def run() -> StepOutputs:
        notes.append("invalid")
        if when == "in the step":
            raise RuntimeError("the step waits for the device")
        return step(inputs(2, 1.0))

    expected = "the step waits" if when == "in the step" else "the capture is invalid"
    with pytest.raises(RuntimeError, match=expected):
        CudaGraphs(torch.device("cuda")).capture(run)
    mended = ["new generator has the state", "generator takes the new", "allocator leaves pool"]
    assert notes[-5:] == ["end", *mended, "caller waits for side"]
