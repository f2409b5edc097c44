"""A looped language model of transformers on `fixed_point`: every prompt turns as often as it needs.

HRM-Text, a language model with a high and a low state that are updated in turns, stands for any looped model: put its
states, its turn and what a turn needs of the prompt in place of the three functions below. The model here is a tiny one
with random weights; `HrmTextForCausalLM.from_pretrained(...)` gives a trained one. Takes seconds; needs transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import HrmTextConfig, HrmTextForCausalLM

import eqr_kernels as ek

State = tuple[Tensor, Tensor]  # z_H, z_L [n, S, d]


def tiny_model() -> HrmTextForCausalLM:
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        H_cycles=3,
        L_cycles=2,
        initializer_range=0.04,
    )
    return HrmTextForCausalLM(config).eval()


def start(model: HrmTextForCausalLM, tokens: Tensor) -> State:
    """Where prompts start, int64 [n, S]."""
    z_H = model.model.embed_tokens(tokens) * model.config.embedding_scale
    return z_H, model.model.z_L_init.expand_as(z_H).contiguous()


def turn(model: HrmTextForCausalLM, z: State, cos: Tensor, sin: Tensor) -> State:
    """One H cycle: L_cycles updates of z_L, then one of z_H. cos, sin [1, S, head_dim]: of the positions.

    Prompts are filled up on the right, where causal attention does not look.
    """
    z_H, z_L = z
    for _ in range(model.config.L_cycles):
        z_L = model.model.L_module(z_L + z_H, position_embeddings=(cos, sin))
    return model.model.H_module(z_H + z_L, position_embeddings=(cos, sin)), z_L


def logits(model: HrmTextForCausalLM, z: State, last: Tensor) -> Tensor:
    """Of the token after the one at `last`, int64 [n]: [n, V]."""
    return model.lm_head(z[0][torch.arange(len(last)), last])


@torch.no_grad()
def main(prompts: int = 32, longest: int = 24) -> ek.FixedPointResult:
    model = tiny_model()
    tokens = torch.randint(256, (prompts, longest))
    last = torch.randint(4, longest, (prompts,))
    angles = model.model.rotary_emb(model.model.embed_tokens(tokens), torch.arange(longest)[None])

    def step(z: State, cos: Tensor, sin: Tensor) -> State:
        return turn(model, z, cos, sin)

    # With tol=0 no prompt stops early: the model's own number of turns gives its own logits.
    whole = ek.fixed_point(step, start(model, tokens), *angles, depth=model.config.H_cycles, tol=0.0)
    own = model(tokens).logits[torch.arange(prompts), last]
    same = torch.isclose(logits(model, whole.z, last), own, rtol=1e-4, atol=1e-5).all(1)
    print(f"{int(same.sum())} of {prompts} prompts have the logits of the model's own forward")

    result = ek.fixed_point(step, start(model, tokens), *angles, depth=128, tol=3e-2, slots=16)
    print(
        f"{int(result.steps.min())} to {int(result.steps.max())} turns a prompt, {int(result.converged.sum())} settled"
    )
    print(f"{result.nfe} computed, and {int(result.steps.max()) * prompts} if all waited for the slowest")
    return result


if __name__ == "__main__":
    main()
