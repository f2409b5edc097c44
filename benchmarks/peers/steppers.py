"""The peers that are PyTorch: each turns a model into a function that runs outer steps of a batch."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eqr_kernels import EquilibriumReasoner

from .eager import Core, EagerStep
from .workload import Unavailable

State = tuple[Tensor, Tensor]
Steps = Callable[[State, Tensor, float, int], tuple[State, Tensor]]
"""((z_H, z_L) [n, S, d], tokens [n, S], noise scale, outer steps) -> the state then, its logits [n, S, V]."""
WHOLE_STEP_LAYERS = 8


class Eager:
    """Eager PyTorch; weights in float32 and cast at every call, or cast once."""

    info: dict[str, Any]

    def __init__(self, dtype: torch.dtype, cast_each_call: bool) -> None:
        self.dtype = dtype
        self.weight_dtype = torch.float32 if cast_each_call else dtype
        self.info = {"weights": str(self.weight_dtype)}

    def steps(self, model: EquilibriumReasoner) -> Steps:
        return _steps(EagerStep(model, self.dtype, self.weight_dtype))


class Compiled:
    """torch.compile of the eager lines, weights cast before.

    Of a whole outer step where that has few layers, else of the module F, whose calls then take long enough that
    another forty calls from Python cost nothing; compiling all of them at once takes minutes.
    """

    def __init__(self, dtype: torch.dtype, autotune: bool, layers_per_step: int, device: str = "cpu") -> None:
        on_gpu = device == "cuda"
        if not on_gpu and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            raise Unavailable("torch.compile needs a C++ compiler on CPU: none of c++, g++ and clang++ is there")
        from torch._inductor import config

        # Inductor's own random numbers are scalar code on CPU: PyTorch's are faster, so the peer gets those.
        config.fallback_random = not on_gpu
        config.freezing = autotune
        self.dtype, self.whole = dtype, layers_per_step <= WHOLE_STEP_LAYERS
        self.options: dict[str, Any] = {"mode": "max-autotune"} if autotune else {}
        self.info: dict[str, Any] = {"freezing": autotune, **self.options}
        self.info["compiled"] = "outer step" if self.whole else "module"
        self.core: Any = None

    def steps(self, model: EquilibriumReasoner) -> Steps:
        if self.whole:
            run = torch.compile(EagerStep(model, self.dtype, self.dtype), dynamic=False, **self.options)
        else:
            if self.core is None:
                core = Core(model, self.dtype).eval()
                self.core = torch.compile(core, dynamic=False, fullgraph=True, **self.options)
            run = EagerStep(model, self.dtype, self.dtype, self.core)
        return _steps(run)


def _steps(run: Callable[..., tuple[Tensor, ...]]) -> Steps:
    def steps(state: State, tokens: Tensor, noise_scale: float, count: int) -> tuple[State, Tensor]:
        z_H, z_L = state
        scale = torch.full((), noise_scale, device=tokens.device)  # a fill: a copy from the host cannot be captured
        for _ in range(count):
            z_H, z_L, logits, _ = run(z_H, z_L, tokens, scale)
        return (z_H, z_L), logits

    return steps


class Graphed:
    """Another peer's outer step in a CUDA graph, replayed; the state goes round inside the graph's own buffers."""

    def __init__(self, peer: Eager | Compiled, device: str) -> None:
        if device != "cuda":
            raise Unavailable(f"CUDA graphs need a CUDA device, and this runs on {device}")
        self.peer = peer
        self.info = {**peer.info, "cuda_graph": "one outer step"}

    def steps(self, model: EquilibriumReasoner) -> Steps:
        run = self.peer.steps(model)
        graphs: dict[float, tuple[torch.cuda.CUDAGraph, State, Tensor, Tensor]] = {}

        def capture(state: State, tokens: Tensor, noise_scale: float) -> None:
            held, held_tokens = (state[0].clone(), state[1].clone()), tokens.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, and makes the workspaces
                    run(held, held_tokens, noise_scale, 1)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                after, logits = run(held, held_tokens, noise_scale, 1)
                for buffer, new in zip(held, after, strict=True):
                    buffer.copy_(new)
            graphs[noise_scale] = graph, held, held_tokens, logits

        def steps(state: State, tokens: Tensor, noise_scale: float, count: int) -> tuple[State, Tensor]:
            if noise_scale not in graphs:
                capture(state, tokens, noise_scale)
            graph, held, held_tokens, logits = graphs[noise_scale]
            for buffer, given in zip((*held, held_tokens), (*state, tokens), strict=True):
                if buffer is not given:
                    buffer.copy_(given)
            for _ in range(count):
                graph.replay()
            return held, logits

        return steps


class TorchDEQ:
    """torchdeq's solver around the eager step with weights cast before: it keeps residuals and the best state."""

    def __init__(self, dtype: torch.dtype) -> None:
        try:
            self.solver = importlib.import_module("torchdeq.solver")
        except ImportError as error:
            raise Unavailable(f"{error}; pip install --no-deps torchdeq") from None
        self.eager = Eager(dtype, cast_each_call=False)
        self.info: dict[str, Any] = {"solver": "fixed_point_iter, return_final"}

    def steps(self, model: EquilibriumReasoner) -> Steps:
        run = self.eager.steps(model)

        def steps(state: State, tokens: Tensor, noise_scale: float, count: int) -> tuple[State, Tensor]:
            logits: Tensor

            def iterate(z: Tensor) -> Tensor:
                nonlocal logits
                after, logits = run((z[:, 0], z[:, 1]), tokens, noise_scale, 1)
                return torch.stack(after, 1)

            start = torch.stack(state, 1)
            end, _, _ = self.solver.fixed_point_iter(iterate, start, max_iter=count, tol=0.0, return_final=True)
            return (end[:, 0], end[:, 1]), logits

        return steps


class Official:
    """The official repository's own network, from the clone that EQR_OFFICIAL_REPO names."""

    def __init__(self, dtype: torch.dtype) -> None:
        folder = os.environ.get("EQR_OFFICIAL_REPO", "")
        if not folder:
            raise Unavailable("set EQR_OFFICIAL_REPO to a clone of the official repository to time its own code")
        if not (Path(folder) / "models" / "eqr.py").is_file():
            raise Unavailable(f"EQR_OFFICIAL_REPO={folder!r} holds no models/eqr.py")
        sys.path.insert(0, folder)
        try:
            self.code = importlib.import_module("models.eqr")
        except ImportError as error:
            raise Unavailable(f"the code in {folder} does not import: {error}; install what it needs") from None
        self.dtype = dtype
        self.info: dict[str, Any] = {}

    def steps(self, model: EquilibriumReasoner) -> Steps:
        code, config = self.code, model.config
        fields = set(code.EqRConfig.model_fields)
        known = {name: value for name, value in config.to_dict().items() if name in fields}
        forward_dtype = str(self.dtype).removeprefix("torch.")
        settings = code.EqRConfig(**known, batch_size=1, H_layers=0, forward_dtype=forward_dtype)
        network = code.InnerNetwork(settings).eval()
        network.load_state_dict(model.state_dict())

        def steps(state: State, tokens: Tensor, noise_scale: float, count: int) -> tuple[State, Tensor]:
            network.L_level.noise_scale = noise_scale
            carry = code.LatentCarry(*state)
            for _ in range(count):
                carry, logits, _ = network(carry, {"inputs": tokens})
            return (carry.z_H, carry.z_L), logits

        return steps


def stepper(
    name: str, dtype: torch.dtype, layers_per_step: int, device: str = "cpu"
) -> Eager | Compiled | Graphed | TorchDEQ | Official:
    """The peer of that name.

    Raises:
        Unavailable: it cannot run here.
    """
    if name in ("cudagraph", "compile-cudagraph"):
        plain = "eager-precast" if name == "cudagraph" else "compile"
        peer = stepper(plain, dtype, layers_per_step, device)
        assert isinstance(peer, Eager | Compiled)
        return Graphed(peer, device)
    if name in ("eager-cast", "eager-precast"):
        return Eager(dtype, cast_each_call=name == "eager-cast")
    if name in ("compile", "compile-autotune"):
        return Compiled(dtype, name == "compile-autotune", layers_per_step, device)
    return TorchDEQ(dtype) if name == "torchdeq" else Official(dtype)
