"""The operator as a torch.nn.Module with the official state-dict keys."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

from eqr_kernels import noise, reference
from eqr_kernels.arguments import check_number
from eqr_kernels.checkpoint import ModelCard, expected_shapes
from eqr_kernels.config import EqRConfig
from eqr_kernels.reference import BlockWeights, OperatorWeights, Rope


class LatentState(NamedTuple):
    """The latent state of n trajectories and the counters that key their noise; rows are independent.

    Attributes:
        z_H, z_L: [n, S, d], the dtype of the weights.
        seed, ids, restart, step: int64 [n]; step counts the outer steps already done.
    """

    z_H: Tensor
    z_L: Tensor
    seed: Tensor
    ids: Tensor
    restart: Tensor
    step: Tensor

    @property
    def rng(self) -> Tensor:
        """Counters as `eqr_kernels.noise` takes them: int64 [n, 4]."""
        return torch.stack([self.seed, self.restart, self.ids, self.step], 1)


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    # On meta first, which skips nn.Linear's own draws: reset_parameters below draws the official ones.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta")
    layer.weight = nn.Parameter(torch.empty(outputs, inputs))
    if bias:
        layer.bias = nn.Parameter(torch.empty(outputs))
    return layer


class SwiGLU(nn.Module):
    """A SwiGLU on an axis of `size` with k hidden units: `gate_up_proj` [2k, size], `down_proj` [size, k]."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = _linear(size, 2 * hidden)
        self.down_proj = _linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self.down_proj(reference.gated(self.gate_up_proj(x)))


class Attention(nn.Module):
    """Weights of the self-attention: `qkv_proj` [3d, d] (q heads, k heads, v heads) and `o_proj` [d, d]."""

    def __init__(self, config: EqRConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = _linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = _linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """x [n, S, d] -> [n, S, d]."""
        return self.o_proj(reference.attend(self.qkv_proj(x), rope, self.config))


class ReasoningBlock(nn.Module):
    """One block: `mlp_t` or `self_attn` mixes tokens, `mlp` mixes features."""

    def __init__(self, config: EqRConfig) -> None:
        super().__init__()
        self.config = config
        if config.mlp_t:
            self.mlp_t = SwiGLU(config.seq_len, config.swiglu_size(config.seq_len))
        else:
            self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.swiglu_size(config.hidden_size))

    def weights(self) -> BlockWeights:
        if self.config.mlp_t:
            mixer = self.mlp_t.gate_up_proj.weight, self.mlp_t.down_proj.weight
        else:
            mixer = self.self_attn.qkv_proj.weight, self.self_attn.o_proj.weight
        return BlockWeights(*mixer, self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight)

    def forward(self, u: Tensor, rope: Rope | None = None) -> Tensor:
        """u [n, S, d] -> [n, S, d]."""
        mixer = self.mlp_t if self.config.mlp_t else partial(self.self_attn, rope=rope)
        return reference.mix(u, mixer, self.mlp, self.config)


class ReasoningModule(nn.Module):
    """The weight-tied module's `L_layers` blocks."""

    def __init__(self, config: EqRConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReasoningBlock(config) for _ in range(config.L_layers))

    def forward(self, u: Tensor, rope: Rope | None = None) -> Tensor:
        """u [n, S, d] -> [n, S, d]."""
        for layer in self.layers:
            u = layer(u, rope)
        return u


class TokenEmbedding(nn.Module):
    """`embedding_weight` [V, d]."""

    def __init__(self, config: EqRConfig) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n, S] -> [n, S, d]."""
        return F.embedding(tokens, self.embedding_weight)


class EqROperator(nn.Module):
    """The operator with its weights: calling it runs one outer step. The state dict has the official keys.

    Args:
        config: the operator's sizes; weights are drawn at random as the official code draws them.
        card: what is known of the weights.
    """

    H_init: Tensor | None
    L_init: Tensor | None

    def __init__(self, config: EqRConfig, *, card: ModelCard | None = None) -> None:
        super().__init__()
        if not isinstance(config, EqRConfig):
            kind = type(config).__name__
            raise TypeError(f"config must be an EqRConfig, got {kind}; use EqRConfig.from_dict for a dict")
        self.card = card
        # Weights made in inference mode could never be trained.
        with torch.inference_mode(False):
            self.embed_tokens = TokenEmbedding(config)
            self.lm_head = _linear(config.hidden_size, config.vocab_size)
            self.q_head = _linear(config.hidden_size, 2, bias=True)
            self.L_level = ReasoningModule(config)
            for name in ("H_init", "L_init"):
                self.register_buffer(name, torch.empty(config.hidden_size) if config.fixed_init else None)
            self._rope_cache: dict[tuple[torch.device, torch.dtype], Rope | None] = {}
            self.config = config
            self.reset_parameters()

    @property
    def card(self) -> ModelCard | None:
        """What is known of the weights."""
        return self._card

    @card.setter
    def card(self, card: ModelCard | None) -> None:
        if card is not None and not isinstance(card, ModelCard):
            kind = type(card).__name__
            raise TypeError(f"card must be a ModelCard or None, got {kind}; use ModelCard.from_json for a card's text")
        self._card = card

    @property
    def config(self) -> EqRConfig:
        """The operator's config; a new one of the same sizes may be set, and holds for every module.

        Raises:
            ValueError: the weights have other sizes than the new one's.
        """
        return self._config

    @config.setter
    def config(self, config: EqRConfig) -> None:
        before = getattr(self, "_config", config)
        if expected_shapes(config) != expected_shapes(before):
            old, new = before.to_dict(), config.to_dict()
            changed = ", ".join(f"{name}={new[name]!r}" for name in new if new[name] != old[name])
            raise ValueError(f"config must have the sizes of the weights, got {changed}; make a new model of it")
        self._config = config
        self._rope_cache.clear()
        for module in self.modules():
            if isinstance(module, (ReasoningBlock, Attention)):
                module.config = config

    def _apply(self, fn: Any, recurse: bool = True) -> EqROperator:
        # As in the constructor: `model.to(...)` in inference mode.
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights afresh from torch's global generator.

        Truncated normals: linear layers of std 1/sqrt(fan_in), the embedding of std 1/sqrt(d), the fixed start states
        (TRM) of std `H_init_std` and `L_init_std`; the q head has weight 0 and biases -5.
        """

        def draw(tensor: Tensor, std: float) -> None:
            # On the CPU, so that a seed gives the same weights on every device.
            uniform = torch.rand(tensor.shape, dtype=torch.float32, device="cpu").clamp(2.0**-24, 1 - 2.0**-24)
            tensor.copy_(noise.truncated_normal(uniform) * std)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(module.weight, 1 / math.sqrt(module.in_features))
        draw(self.embed_tokens.embedding_weight, 1 / math.sqrt(self.config.hidden_size))
        self.q_head.weight.zero_()
        self.q_head.bias.fill_(-5)
        if self.H_init is not None and self.L_init is not None:
            draw(self.H_init, self.config.H_init_std)
            draw(self.L_init, self.config.L_init_std)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the latent state."""
        return self._first_weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._first_weight.device

    @property
    def _first_weight(self) -> Tensor:
        # Of the embedding, which is a plain weight even where linear layers were quantised.
        weight = getattr(self.embed_tokens, "embedding_weight", None)
        if isinstance(weight, Tensor):
            return weight
        return next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))

    def weights(self) -> OperatorWeights:
        """The weights as `eqr_kernels.reference` takes them; shares memory with the parameters."""
        blocks = tuple(layer.weights() for layer in self.L_level.layers)  # type: ignore[operator]
        return OperatorWeights(
            self.embed_tokens.embedding_weight, self.lm_head.weight, self.q_head.weight, self.q_head.bias, blocks
        )

    def rope(self) -> Rope | None:
        """Rotary angles [S, head_dim] in float32 (float64 for a float64 model), or None."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        key = (self.device, dtype)
        if key in self._rope_cache:
            return self._rope_cache[key]
        # An inference tensor in the cache would spoil every later backward pass, a fake one every later pass.
        with torch.inference_mode(False):
            rope = reference.rope_angles(self.config, *key)
        if rope is None or not isinstance(rope.cos, FakeTensor):
            self._rope_cache[key] = rope
        return rope

    def embed(self, tokens: Tensor) -> Tensor:
        """The input injection of tokens [n, S] -> [n, S, d]."""
        return reference.scaled(self.embed_tokens(tokens))

    def heads(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, S, V] and the halting logit q_halt [n], in float32 (float64 stays float64), of z_H [n, S, d]."""
        return self.lm_head(z_H), reference.wide(self.q_head(z_H[:, 0]))[:, 0]

    def initial_state(
        self, n: int | Tensor, seed: int = 0, *, ids: Tensor | None = None, restart: int | Tensor = 0
    ) -> LatentState:
        """Start states: random ones (RI), or the buffers `H_init`, `L_init` of a model with `fixed_init`.

        Args:
            n: number of rows, or the tokens [n, S] themselves, from which ids are hashed as `solve` does; may be 0.
            seed: 0 to 2**32 - 1.
            ids: int64 [n], key the random stream; default 0..n-1, or the hash of the tokens.
            restart: int or int64 [n], number of the trajectory of its puzzle.

        Raises:
            TypeError, ValueError: an argument has the wrong type or is out of range.
        """
        seed = noise.check_word("seed", seed, 32)
        if isinstance(n, Tensor):
            tokens = check_tokens(n, self.config).to(self.device)
            count = tokens.shape[0]
            default = noise.hash_tokens(tokens)
        else:
            if isinstance(n, bool) or not isinstance(n, int):
                raise TypeError(f"n must be an int or a tokens tensor [n, S], got {type(n).__name__}")
            if n < 0:
                raise ValueError(f"n must not be negative, got {n}")
            count, default = n, torch.arange(n, device=self.device)
        if ids is None:
            ids = default
        ids = check_ids(ids, count).to(self.device)
        if isinstance(restart, Tensor):
            if has_values(restart):
                noise.check_words("restart", restart, 32)
            if restart.shape not in ((), (count,)):
                raise ValueError(f"restart must be an int or have shape [{count}], got {list(restart.shape)}")
            restart = restart.to(self.device).expand(count)
        else:
            restart = torch.full_like(ids, noise.check_word("restart", restart, 32))
        seeds, step = torch.full_like(ids, seed), torch.zeros_like(ids)
        rng = noise.make_rng(seeds, restart, ids, step)
        z_H, z_L = self.start(rng)
        return LatentState(z_H, z_L, seeds, ids, restart.clone(), step)

    def start(self, rng: Tensor) -> tuple[Tensor, Tensor]:
        """Start states z_H, z_L [n, S, d] of trajectories with counters `rng`, int64 [n, 4]."""
        shape = (self.config.seq_len, self.config.hidden_size)
        if self.H_init is not None and self.L_init is not None:
            full = (rng.shape[0], *shape)
            return self.H_init.to(self.dtype).expand(full).clone(), self.L_init.to(self.dtype).expand(full).clone()
        high = torch.float64 if self.dtype == torch.float64 else torch.float32
        z_H = noise.start(rng, noise.START_H, shape, high) * self.config.H_init_std
        z_L = noise.start(rng, noise.START_L, shape, high) * self.config.L_init_std
        return z_H.to(self.dtype), z_L.to(self.dtype)

    def forward(
        self, tokens: Tensor, state: LatentState, *, noise_scale: float | None = None
    ) -> tuple[LatentState, Tensor, Tensor]:
        """One outer step; the state that comes back is detached, as in segmented online training.

        It runs through the modules as they are, so hooks are called and replaced layers are used. (A reasoner that is
        trained in bfloat16 on CPU takes a fused kernel where its modules are plain, see
        `EquilibriumReasoner.step_kernel`.)

        Args:
            tokens: integers [n, S] in 0..V-1.
            state: of the same n rows.
            noise_scale: of the noise injection; None takes the config's. (`solve` takes the card's recommendation where
                there is one.)

        Returns:
            The next state, logits [n, S, V] in the dtype of the weights (under autocast in its dtype), q_halt [n] in
            float32 (float64 for a float64 model). Gradients flow through the last latent recursion only.

        Raises:
            TypeError, ValueError: tokens or state have the wrong dtype, shape or (where tensors have values: not under
                torch.compile or vmap, on the meta device or in a FakeTensorMode) range.
        """
        tokens = check_tokens(tokens, self.config)
        self._check_state(state, tokens.shape[0])
        if noise_scale is not None and not torch.compiler.is_compiling():
            check_number("noise_scale", noise_scale)
        scale = self.config.noise_scale if noise_scale is None else noise_scale
        z_H, z_L, logits, q_halt = self._outer_step(tokens, state, scale)
        return state._replace(z_H=z_H.detach(), z_L=z_L.detach(), step=state.step + 1), logits, q_halt

    def _outer_step(self, tokens: Tensor, state: LatentState, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next z_H and z_L [n, S, d], logits [n, S, V], q_halt [n]; tokens int64 [n, S] and state are checked."""
        config, rng = self.config, state.rng

        def update(z: Tensor, u: Tensor, number: int) -> Tensor:
            eps = noise.normal(rng, noise.FIRST_UPDATE + number, tuple(z.shape[1:]), z.dtype) if scale else None
            return reference.damped_update(z, u, eps, config.lambda_, scale)

        blocks = partial(self.L_level, rope=self.rope())
        z_H, z_L = reference.outer_step(state.z_H, state.z_L, self.embed(tokens), blocks, config, update)
        return z_H, z_L, *self.heads(z_H)

    def _check_state(self, state: LatentState, n: int) -> None:
        check_fields("state", state)
        shape = (n, self.config.seq_len, self.config.hidden_size)
        for name, z in (("z_H", state.z_H), ("z_L", state.z_L)):
            if tuple(z.shape) != shape or z.dtype != self.dtype:
                raise ValueError(
                    f"state.{name} must be {self.dtype} of shape {list(shape)} for these tokens and this model, "
                    f"got {z.dtype} {list(z.shape)}; start from initial_state"
                )
        for name, bits in (("seed", 32), ("restart", 32), ("step", 24)):
            words = getattr(state, name)
            if tuple(words.shape) != (n,):
                raise ValueError(
                    f"state.{name} must have shape [{n}], got {list(words.shape)}; start from initial_state"
                )
            if has_values(words):
                noise.check_words(f"state.{name}", words, bits)
        check_ids(state.ids, n)

    @property
    def inference_noise_scale(self) -> float:
        """What `solve` takes for noise_scale=None: the card's, else the config's."""
        recommended = None if self.card is None else self.card.noise_scale
        return self.config.noise_scale if recommended is None else recommended

    @property
    def inference_window(self) -> int:
        """What `solve` takes for window=None: the card's, else 3."""
        return (self.card.window if self.card else 0) or 3


def has_values(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at: not on meta, in a FakeTensorMode, or under torch.compile or vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not is_functorch_wrapped_tensor(tensor)


def check_fields(name: str, state: object) -> None:
    """Checks that `state` is a LatentState of tensors.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(state, LatentState):
        raise TypeError(f"{name} must be a LatentState, got {type(state).__name__}; see model.initial_state")
    for field, value in zip(state._fields, state, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}.{field} must be a tensor, got {type(value).__name__}; see model.initial_state")


def check_tokens(tokens: Tensor, config: EqRConfig) -> Tensor:
    """`tokens` [n, S] as int64.

    Raises:
        TypeError: not an integer tensor.
        ValueError: wrong shape, or (where it has values) a token outside 0..V-1.
    """
    if not isinstance(tokens, Tensor):
        kind = type(tokens).__name__
        raise TypeError(f"tokens must be a torch.Tensor [n, {config.seq_len}], got {kind}; use torch.as_tensor")
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be an integer tensor, got {tokens.dtype}; use tokens.long()")
    if tokens.ndim != 2 or tokens.shape[1] != config.seq_len:
        raise ValueError(f"tokens must have shape [n, {config.seq_len}], got {list(tokens.shape)}")
    tokens = tokens.to(torch.int64)
    if has_values(tokens) and tokens.numel():
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= config.vocab_size:
            row = int(((tokens < 0) | (tokens >= config.vocab_size)).any(1).nonzero()[0])
            raise ValueError(
                f"tokens must be in 0..{config.vocab_size - 1}, got {low if low < 0 else high} in row {row}; "
                "eqr_kernels.tasks encodes puzzles as tokens"
            )
    return tokens


def check_ids(ids: Tensor, n: int) -> Tensor:
    """`ids` [n] as int64.

    Raises:
        TypeError, ValueError: not an integer tensor, or not of shape [n].
    """
    if not isinstance(ids, Tensor) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids must be an int64 tensor [{n}], got {got}")
    if tuple(ids.shape) != (n,):
        raise ValueError(f"ids must have shape [{n}], one for each row of tokens, got {list(ids.shape)}")
    return ids.to(torch.int64)
