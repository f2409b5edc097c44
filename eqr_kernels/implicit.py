"""`FixedPoint`: a layer whose output is the fixed point of a module, with gradients in memory constant in depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eqr_kernels.arguments import check_choice, check_count
from eqr_kernels.iteration import FixedPointResult, State, fixed_point
from eqr_kernels.not_compiled import not_compiled

BACKWARD = ("implicit", "phantom", "last")
_OPTIONS = ("depth", "tol", "patience", "slots", "solver", "lambda_", "memory")


class FixedPoint(nn.Module):
    """z* = module(z*, *args), every row to its own fixed point, differentiable in the module's parameters and in args.

    The way there is `fixed_point` without gradients: memory does not grow with its length. Of the gradient at z*:

    - "implicit": exact at the fixed point. v = g + (dF/dz)^T v is solved by `fixed_point` as well, each row until it
      has settled (Bai, Kolter and Koltun, "Deep equilibrium models", 2019, section 3). In float32 about as exact as
      the two tolerances.
    - "phantom": through `unroll` damped steps z <- (1 - damping) z + damping F(z) from z* (Geng, Zhang, Bai, Wang and
      Lin, "On training implicit models", 2021).
    - "last": through one step from z*, as Equilibrium Reasoners are trained.

    z0 gets no gradient: a fixed point does not depend on where it was looked for. Where no gradient is wanted the
    output is that of `fixed_point`; else it is one application of the module further.

    Args:
        module: (z, *args) -> the next z, z a float tensor [n, ...] or a tuple of such; rows independent. It must give
            the same for the same input (no dropout), or "implicit" is not its gradient.
        backward: "implicit", "phantom" or "last".
        unroll, damping: of "phantom": steps, at least 1; and 0 < damping <= 1.
        backward_depth, backward_tol: of the backward iteration of "implicit"; None takes depth and tol.
        options: of `fixed_point`: depth, tol, patience, slots, solver, lambda_, memory.

    Attributes:
        result: the `FixedPointResult` of the last call: steps, residuals and who has converged.
        backward_result: that of the last implicit backward pass.

    Examples:
        >>> class Cell(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, 4)
        ...
        ...     def forward(self, z, x):
        ...         return torch.tanh(0.5 * self.linear(z) + x)
        >>> layer = FixedPoint(Cell(), depth=200, tol=1e-6)
        >>> x = torch.randn(3, 4)
        >>> z = layer(torch.zeros(3, 4), x)
        >>> torch.allclose(z, layer.module(z, x), atol=1e-5)
        True
        >>> z.sum().backward()

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        module: Callable[..., State],
        *,
        backward: str = "implicit",
        unroll: int = 5,
        damping: float = 0.5,
        backward_depth: int | None = None,
        backward_tol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise TypeError(f"module must be callable, (z, *args) -> z, got {type(module).__name__}")
        check_choice("backward", backward, BACKWARD)
        check_count("unroll", unroll)
        if not 0 < damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {damping}")
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"options must be some of {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        # What is wrong with them is said here and not at the first call.
        fixed_point(lambda z: z, torch.zeros(0, 1), **options)
        self.module = module
        self.backward, self.unroll, self.damping, self.options = backward, unroll, damping, options
        self.backward_options = options | {
            name: value for name, value in (("depth", backward_depth), ("tol", backward_tol)) if value is not None
        }
        self.result: FixedPointResult | None = None
        self.backward_result: FixedPointResult | None = None

    def extra_repr(self) -> str:
        return ", ".join([f"backward={self.backward!r}", *(f"{k}={v!r}" for k, v in self.options.items())])

    def forward(self, z0: State, *args: Any) -> State:
        """The fixed points, like z0: a tensor [N, ...] or a tuple of such. args: see `fixed_point`."""
        self.result = fixed_point(self.module, z0, *args, **self.options)
        z: State = self.result.z
        if not torch.is_grad_enabled():
            return z
        if self.backward == "phantom":
            for _ in range(self.unroll):
                z = _mixed(z, self.module(z, *args), self.damping)
            return z
        out: State = self.module(z, *args)
        return self._with_adjoint(out, z, args) if self.backward == "implicit" else out

    @not_compiled
    def _with_adjoint(self, out: State, z: State, args: tuple[Any, ...]) -> State:
        """`out`, whose gradient g is replaced by v = g + (dF/dz)^T v on its way to parameters and args."""
        vjp = _VectorJacobian(self.module, isinstance(z, Tensor), _parts(z)[0].device.type)
        held = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)

        def solve(g: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.backward_result = fixed_point(vjp.plus, g, *g, *_parts(z), *held, **self.backward_options)
            solved: tuple[Tensor, ...] = self.backward_result.z
            return solved

        outs = _Adjoint.apply(solve, *_parts(out))
        return outs[0] if isinstance(out, Tensor) else tuple(outs)

    def spectral_radius(self, z: State, *args: Any, steps: int = 50, seed: int = 0) -> Tensor:
        """The modulus of the largest eigenvalue of dF/dz at each row of z, float32 [n], by power iteration.

        Below 1 the iteration contracts near a fixed point, at about that rate a step. The mean growth over the second
        half of the steps is taken, so that a pair of complex eigenvalues does no harm.

        Args:
            z, args: as for `forward`; usually its output.
            steps: of the power iteration, at least 2; each is one vector-Jacobian product.
            seed: of the vectors that it starts from.
        """
        check_count("steps", steps - 1)
        parts = tuple(part.detach() for part in _parts(z))
        vjp = _VectorJacobian(self.module, isinstance(z, Tensor), parts[0].device.type)
        held = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        generator = torch.Generator().manual_seed(seed)
        v = tuple(torch.randn(part.shape, generator=generator, device="cpu").to(part) for part in parts)
        growth = []
        for _ in range(steps):
            norm = _norm(v)
            v = vjp(_divided(v, norm.clamp_min(torch.finfo(torch.float32).tiny)), parts, *held)
            growth.append(_norm(v))
        second_half = torch.stack(growth[steps // 2 :])
        return second_half.log().mean(0).exp()


class _Adjoint(torch.autograd.Function):
    """The identity on the states that a step gives; `solve` makes of their gradients those that it passes on."""

    @staticmethod
    def forward(ctx: Any, solve: Callable[..., tuple[Tensor, ...]], *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        return tuple(out.view_as(out) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Who asked for a graph of the gradient would get one in which this part is missing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                'backward="implicit" gives first derivatives only, and a graph of the gradient was asked for '
                '(create_graph=True); use backward="phantom"'
            )
        return None, *ctx.solve(grads)


class _VectorJacobian:
    """v -> (dF/dz)^T v at rows of z. The graph of F is made anew only when the rows are others.

    Compiled code forbids a second pass through its graph, which is then made anew for each product.

    Args:
        module: F.
        single: z is one tensor, not a tuple.
        device: its type, whose autocast at this time holds for F.
    """

    def __init__(self, module: Callable[..., State], single: bool, device: str) -> None:
        self.module, self.single = module, single
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = partial(torch.autocast, device, dtype, enabled=enabled)
        self.retains = not _is_compiled(module)
        self.rows: Tensor | None = None
        self.z: list[Tensor] = []
        self.f: tuple[Tensor, ...] = ()

    def __call__(self, v: tuple[Tensor, ...], z: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
        if self.rows is not z[0] or not self.retains:
            self.rows = z[0]
            self.z = [part.detach().requires_grad_() for part in z]
            with torch.enable_grad(), self.autocast():
                self.f = _parts(self.module(self.z[0] if self.single else tuple(self.z), *args))
        grads = torch.autograd.grad(self.f, self.z, v, retain_graph=self.retains, allow_unused=True)
        return tuple(torch.zeros_like(part) if grad is None else grad for grad, part in zip(grads, self.z, strict=True))

    def plus(self, v: tuple[Tensor, ...], *others: Any) -> tuple[Tensor, ...]:
        """g + (dF/dz)^T v: the parts of g, then those of z, then the arguments of F."""
        g, z, args = others[: len(v)], others[len(v) : 2 * len(v)], others[2 * len(v) :]
        return tuple(a + b for a, b in zip(g, self(v, z, *args), strict=True))


def _is_compiled(module: Callable[..., State]) -> bool:
    """Whether torch.compile made it, or a part of it."""
    if not isinstance(module, nn.Module):
        return hasattr(module, "_torchdynamo_orig_callable")
    # Its wrapper has this attribute; torch._dynamo itself is not imported for a look.
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in module.modules())


def _parts(z: State) -> tuple[Tensor, ...]:
    return (z,) if isinstance(z, Tensor) else tuple(z)


def _mixed(z: State, new: State, weight: float) -> State:
    """(1 - weight) z + weight new."""
    mixed = tuple((1 - weight) * a + weight * b for a, b in zip(_parts(z), _parts(new), strict=True))
    return mixed[0] if isinstance(z, Tensor) else mixed


def _norm(v: tuple[Tensor, ...]) -> Tensor:
    """Of each row over all tensors, float32 [n]."""
    return torch.stack([part.flatten(1).float().square().sum(1) for part in v]).sum(0).sqrt()


def _divided(v: tuple[Tensor, ...], by: Tensor) -> tuple[Tensor, ...]:
    """Each row by its number, [n]."""
    return tuple(part / by.to(part.dtype).view(-1, *[1] * (part.ndim - 1)) for part in v)
