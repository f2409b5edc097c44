"""Whether a model's modules still compute the plain operator, which is what the fused kernels compute.

They do not where a user overrode a method, registered a hook, replaced or wrapped a layer (LoRA, dynamic
quantisation, pruning, weight norm) or gave a layer weights that compute in their own way (quantised tensors): such a
model is run through its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize

from eqr_kernels.checkpoint import expected_shapes
from eqr_kernels.modules import (
    Attention,
    EqROperator,
    LatentState,
    ReasoningBlock,
    ReasoningModule,
    SwiGLU,
    TokenEmbedding,
)

_INNER: tuple[type[nn.Module], ...] = (
    TokenEmbedding,
    ReasoningModule,
    nn.ModuleList,
    ReasoningBlock,
    Attention,
    SwiGLU,
    nn.Linear,
)
_WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    TokenEmbedding: ("embedding_weight",),
    nn.Linear: ("weight", "bias"),
}
# As they are here; a class may be patched later.
_FORWARDS = {kind: kind.forward for kind in _INNER}
_METHODS = {kind: {name for name in dir(kind) if callable(getattr(kind, name))} for kind in _INNER}
_OPERATOR = {
    name: getattr(EqROperator, name)
    for name in ("forward", "__call__", "start", "initial_state", "rope", "embed", "heads", "weights")
}

_FORWARD_HOOKS = {"_forward_pre_hooks": "a forward pre-hook", "_forward_hooks": "a forward hook"}
_BACKWARD_HOOKS = {"_backward_pre_hooks": "a backward pre-hook", "_backward_hooks": "a backward hook"}


def modification(model: EqROperator, *, training: bool = False) -> str | None:
    """What makes the model compute something else than the plain operator, naming the module; None where nothing does.

    A layer whose weights are parametrised by `torch.nn.utils.parametrize` is plain: its weights are read at every call.

    Args:
        training: also what only a backward pass would meet: backward hooks, hooks of parameters' gradients, and
            parametrised weights.
    """
    hooks = _FORWARD_HOOKS | (_BACKWARD_HOOKS if training else {})
    for name, what in hooks.items():
        if getattr(module_globals, f"_global{name}"):
            return f"{what} is registered for all modules"
    for name in _OPERATOR:
        if overrides(model, name):
            return f"{type(model).__name__} overrides {name}"
    starts = [None if start is None else list(start.shape) for start in (model.H_init, model.L_init)]
    if starts not in ([None, None], [[model.config.hidden_size]] * 2):
        return f"H_init and L_init are {starts[0]} and {starts[1]}, not both [{model.config.hidden_size}]"
    shapes = expected_shapes(model.config)
    if why := _hooked("the model", model, hooks):
        return why
    for path, kind in _expected(model):
        module: Any = model
        for part in path.split("."):
            # By names, as the blocks may be shared; a wrapper need not have the parts of what it replaced.
            module = getattr(module, part, None)
        why = (
            _replaced(path, module, kind, training)
            or _hooked(path, module, hooks)
            or _other_weights(path, module, shapes)
        )
        if why:
            return why
        if kind in (ReasoningBlock, Attention) and module.config != model.config:
            return f"{path} has a config of its own"
    for name, parameter in model.named_parameters() if training else ():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"the gradient of {name} has a hook"
    layers, config = len(model.L_level.layers), model.config.L_layers
    return None if layers == config else f"L_level.layers has {layers} blocks, and config.L_layers is {config}"


def overrides(model: EqROperator, name: str) -> bool:
    """Whether the model has its own method of a name in place of the operator's."""
    return getattr(type(model), name) is not _OPERATOR[name] or name in vars(model)


def _expected(model: EqROperator) -> Iterator[tuple[str, type[nn.Module]]]:
    """Every inner module's name and class, each before its parts."""
    yield from (("embed_tokens", TokenEmbedding), ("lm_head", nn.Linear), ("q_head", nn.Linear))
    yield from (("L_level", ReasoningModule), ("L_level.layers", nn.ModuleList))
    for layer in (f"L_level.layers.{i}" for i in range(model.config.L_layers)):
        yield layer, ReasoningBlock
        if model.config.mlp_t:
            yield f"{layer}.mlp_t", SwiGLU
            yield from ((f"{layer}.mlp_t.{name}", nn.Linear) for name in ("gate_up_proj", "down_proj"))
        else:
            yield f"{layer}.self_attn", Attention
            yield from ((f"{layer}.self_attn.{name}", nn.Linear) for name in ("qkv_proj", "o_proj"))
        yield f"{layer}.mlp", SwiGLU
        yield from ((f"{layer}.mlp.{name}", nn.Linear) for name in ("gate_up_proj", "down_proj"))


def _replaced(path: str, module: Any, kind: type[nn.Module], training: bool) -> str | None:
    parametrised = isinstance(module, nn.Module) and parametrize.is_parametrized(module)
    if training and parametrised:
        return f"{path} has parametrised weights"
    base = type(module).__bases__[0] if parametrised else type(module)
    if base is not kind:
        return f"{path} is a {type(module).__module__}.{type(module).__qualname__}, not a {kind.__name__}"
    if base.forward is not _FORWARDS[kind]:
        return f"forward of {path} was replaced"
    for name in _METHODS[kind] & vars(module).keys():
        return f"{name} of {path} was replaced"
    if kind is nn.Linear and (module.bias is not None) != (path == "q_head"):
        return f"{path} has {'no bias' if path == 'q_head' else 'a bias'}"
    return None


def _other_weights(path: str, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str | None:
    if parametrize.is_parametrized(module):
        return None  # they are plain tensors, and dear to compute only to look at
    for name in _WEIGHTS.get(type(module), ()):
        weight, name = getattr(module, name), f"{path}.{name}"
        if weight is None:
            continue
        if type(weight) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(weight).__module__}.{type(weight).__qualname__}, not a plain tensor"
        if weight.layout is not torch.strided:
            return f"{name} is {weight.layout}, not dense"
        if tuple(weight.shape) != shapes[name]:
            return f"{name} is {list(weight.shape)}, where the config has {list(shapes[name])}"
    return None


def _hooked(path: str, module: nn.Module, hooks: dict[str, str]) -> str | None:
    return next((f"{path} has {what}" for name, what in hooks.items() if getattr(module, name)), None)


def called(
    model: EqROperator, tokens: Tensor, state: LatentState, **keywords: Any
) -> tuple[LatentState, Tensor, Tensor]:
    """One outer step of a model as its user made it, tokens int64 [n, S]; what it gives is checked.

    Raises:
        TypeError: that is not (state, logits [n, S, V], q_halt [n]).
    """
    result, c, (n, length, _) = model(tokens, state, **keywords), model.config, state.z_H.shape
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[0], LatentState):
        after, logits, q_halt = result
        states = (after.z_H, after.z_L)
        same = all(_shape(z) == state.z_H.shape and z.dtype == state.z_H.dtype for z in states)
        if same and _shape(logits) == (n, length, c.vocab_size) and _shape(q_halt) == (n,):
            return after, logits, q_halt
    raise TypeError(
        f"forward of {type(model).__name__} must give (LatentState of {state.z_H.dtype} {list(state.z_H.shape)}, "
        f"logits [{n}, {length}, {c.vocab_size}], q_halt [{n}]), got {_kinds(result)}"
    )


def _shape(value: object) -> tuple[int, ...] | None:
    """None of what is no tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _kinds(result: object) -> str:
    if isinstance(result, LatentState):
        return f"LatentState of {_kinds(result.z_H)}"
    if isinstance(result, Tensor):
        return f"{result.dtype} {list(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_kinds, result))})"
    return type(result).__name__
