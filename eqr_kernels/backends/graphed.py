"""An outer step as CUDA graphs: one replay in place of hundreds of launches, a graph for each number of rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KEPT = 8
"""Graphs that a loop keeps at most: buckets are powers of two, and only neighbours come back often."""


class StepInputs(NamedTuple):
    """The states of n rows before an outer step, with all that the step reads besides the weights."""

    z_H: Tensor  # [n, S, d]
    z_L: Tensor  # [n, S, d]
    injection: Tensor  # [n, S, d], of the input; or the tokens int64 [n, S] of a model that runs through its modules
    rng: Tensor  # int64 [n, 4], see `eqr_kernels.noise`


class StepOutputs(NamedTuple):
    """What an outer step of n rows gives."""

    z_H: Tensor  # [n, S, d]
    z_L: Tensor  # [n, S, d]
    residual: Tensor  # float32 [n]
    logits: Tensor  # float32 [n, S, V]
    q_halt: Tensor  # float32 [n]


Step = Callable[[StepInputs], StepOutputs]


class Graphs(Protocol):
    """What records a function's work on the device and repeats it."""

    def why_not(self) -> str | None:
        """Why nothing can be captured now, or None."""

    def warm_up(self, run: Callable[[], StepOutputs]) -> StepOutputs:
        """Runs an outer step once, without which none can be captured."""

    def capture(self, run: Callable[[], StepOutputs]) -> tuple[Callable[[], None], StepOutputs]:
        """Records an outer step without doing it: what repeats it, and the tensors that every repeat fills."""


class CudaGraphs:
    """Graphs of one device, captured on a side stream; all share one memory pool.

    A capture forbids unsafe calls in its own thread alone, so that other threads may go on meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def why_not(self) -> str | None:
        if torch.cuda.is_current_stream_capturing():
            return "the current stream is itself being captured"
        return None

    def warm_up(self, run: Callable[[], StepOutputs]) -> StepOutputs:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            # Handles and workspaces belong to a stream: they must exist on the one that is captured.
            self.stream.wait_stream(current)
            try:
                with torch.cuda.stream(self.stream):
                    outputs = run()
            finally:
                current.wait_stream(self.stream)
            for output in outputs:
                output.record_stream(current)
            return outputs

    def capture(self, run: Callable[[], StepOutputs]) -> tuple[Callable[[], None], StepOutputs]:
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            before = generator.get_state()
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(self.stream):
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        outputs = run()
                    except BaseException:
                        # The stream must leave the capture, whose own error would hide this one.
                        with suppress(RuntimeError):
                            graph.capture_end()
                        raise
                    graph.capture_end()
            except BaseException:
                self._mend(generator, before)
                raise
            finally:
                current.wait_stream(self.stream)
            return graph.replay, outputs

    def _mend(self, generator: torch.Generator, before: Tensor) -> None:
        """Takes torch's generator and allocator out of a capture that failed, in which they would stay."""
        clean = torch.Generator(self.device)
        clean.set_state(before)
        generator.graphsafe_set_state(clean.graphsafe_get_state())
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):  # it was taken out already
                end(torch.cuda.current_device(), self.pool)


def cuda_graphs(device: torch.device) -> Graphs | None:
    """The graphs of a CUDA device; None on every other device."""
    return CudaGraphs(device) if device.type == "cuda" else None


class _Captured(NamedTuple):
    replay: Callable[[], None]
    outputs: StepOutputs


class GraphedStep:
    """An outer step that replays a graph from the second time on that it meets a number of rows.

    The first time it runs the step eagerly, which is the warm-up that a capture needs and a result besides. Inputs are
    copied to buffers of the largest number of rows, of which each graph reads the first. Outputs are the graph's own:
    the next call with as many rows overwrites them. Where nothing can be captured the step runs eagerly.

    Args:
        step: pure work on the device, without a wait for it.
        rows: the largest number of rows that will come.
        tell: called with the reason when steps run eagerly after all.
    """

    def __init__(self, step: Step, graphs: Graphs, rows: int, tell: Callable[[str], object], kept: int = KEPT) -> None:
        self.step, self.graphs, self.rows, self.tell, self.kept = step, graphs, rows, tell, kept
        self.buffers: StepInputs | None = None
        self.why_eager: str | None = None
        self._seen: set[int] = set()
        self._captured: OrderedDict[int, _Captured] = OrderedDict()

    def __call__(self, inputs: StepInputs) -> StepOutputs:
        n = len(inputs.z_H)
        if self.why_eager is not None:
            return self.step(inputs)
        if n not in self._seen:
            if why_not := self.graphs.why_not():
                return self._eagerly(why_not, inputs)
            self._seen.add(n)
            return self.graphs.warm_up(partial(self.step, inputs))
        buffers = self._fill(inputs)
        captured = self._captured.get(n)
        if captured is None:
            try:
                captured = self._capture(n, buffers)
            except RuntimeError as error:
                return self._eagerly(f"an outer step cannot be captured: {_headline(error)}", inputs)
        self._captured.move_to_end(n)
        captured.replay()
        return captured.outputs

    def _fill(self, inputs: StepInputs) -> StepInputs:
        """The inputs, in the first rows of the static buffers."""
        n = len(inputs.z_H)
        if self.buffers is None:
            self.buffers = StepInputs(*(t.new_empty(self.rows, *t.shape[1:]) for t in inputs))
        views = StepInputs(*(buffer[:n] for buffer in self.buffers))
        for view, tensor in zip(views, inputs, strict=True):
            view.copy_(tensor)
        return views

    def _capture(self, n: int, buffers: StepInputs) -> _Captured:
        while len(self._captured) >= self.kept:
            self._captured.popitem(last=False)
        captured = self._captured[n] = _Captured(*self.graphs.capture(partial(self.step, buffers)))
        return captured

    def _eagerly(self, why: str, inputs: StepInputs) -> StepOutputs:
        self.why_eager = why
        self._captured.clear()
        self.tell(f"outer steps ran eagerly: {why}")
        return self.step(inputs)


def _headline(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
