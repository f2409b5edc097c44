"""A looped transformer that finds the running parity of bits, and needs as many steps as the bits are long.

A token sees itself and its left neighbour, so that one step carries a parity one place to the right: how often the loop
must turn is a property of the row. `fixed_point` lets each row turn until it has settled, also rows five times as long
as those of the training. Draws steps against length to looped_transformer.png where matplotlib is installed. Takes
under a minute on two quiet cores.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eqr_kernels as ek

WIDTH, HEADS = 48, 4
BEGIN = 2


class Block(nn.Module):
    """One turn of the loop: z [n, S, WIDTH], tokens int64 [n, S] -> the next z."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(HEADS, 2))  # of itself and of the left neighbour
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        h = self.embed(tokens)
        q, k, v = self.qkv(z + h).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # [n, HEADS, S, WIDTH / HEADS]
        left = torch.arange(length)[:, None] - torch.arange(length)
        bias = self.bias[:, left.clamp(0, 1)].masked_fill((left < 0) | (left > 1), -torch.inf)  # [HEADS, S, S]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        h = self.norms[0](h + self.out(attended.transpose(1, 2).reshape(n, length, WIDTH)))
        return self.norms[1](h + self.mlp(h))


def rows_of(n: int, length: int) -> tuple[Tensor, Tensor]:
    """BEGIN and random bits, int64 [n, length + 1], and the parity of the bits up to each."""
    bits = torch.randint(2, (n, length))
    return F.pad(bits, (1, 0), value=BEGIN), F.pad(bits.cumsum(1) % 2, (1, 0))


def train(block: Block, updates: int) -> float:
    """On rows of 1 to 8 bits, the longer ones later, as many turns as they need and some more; the loss at the end."""
    optimizer = torch.optim.AdamW(block.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, updates)
    for update in range(updates):
        length = int(torch.randint(1, 3 + min(6, 9 * update // updates), ()))
        tokens, labels = rows_of(128, length)
        z, losses = torch.zeros(*tokens.shape, WIDTH), []
        for turn in range(length + 3):
            before, z = z, block(z, tokens)
            if turn >= length:
                # Once it is right it must stay so: a fixed point, whatever the number of turns.
                still = (z - before).square().mean() if turn > length else 0.0
                losses.append(F.cross_entropy(block.head(z).flatten(0, 1), labels.flatten()) + 0.15 * still)
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (update + 1) % 100 == 0:
            print(f"update {update + 1:5}  loss {loss.item():.4f}")
    return loss.item()


def measure(block: Block, lengths: list[int], rows: int = 64) -> dict[int, tuple[float, float]]:
    """Length -> mean steps until a row has settled, and the share of rows whose parities are all right.

    All rows are one batch: shorter ones are filled up with zeros on the right, where nothing looks back to.
    """
    size = torch.tensor(lengths).repeat_interleave(rows)
    tokens, labels = rows_of(len(size), max(lengths))
    inside = torch.arange(tokens.shape[1]) <= size[:, None]  # [N, S]
    depth = 4 * max(lengths)

    def step(z: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
        return block(z, tokens) * inside[..., None]

    result = ek.fixed_point(step, torch.zeros(*tokens.shape, WIDTH), tokens, inside, depth=depth, tol=1e-2)
    with torch.no_grad():
        right = ((block.head(result.z).argmax(-1) == labels) | ~inside).all(1)
    print(f"{result.nfe} rows computed; {int(result.steps.max()) * len(size)} if all waited for the slowest")
    return {
        length: (result.steps[size == length].float().mean().item(), right[size == length].float().mean().item())
        for length in lengths
    }


def draw(results: dict[int, tuple[float, float]], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(list(results), [steps for steps, _ in results.values()], "o-")
    axes.axvspan(0, 8, alpha=0.15, label="lengths of the training")
    axes.set(xlabel="bits", ylabel="steps until settled", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(updates: int = 800, picture: str = "looped_transformer.png") -> dict[int, tuple[float, float]]:
    torch.manual_seed(0)
    block = Block()
    train(block, updates)
    results = measure(block, [1, 2, 4, 6, 8, 12, 16, 24, 32, 40])
    for length, (steps, right) in results.items():
        print(f"{length:3} bits  {steps:5.1f} steps  {right:6.1%} right")
    if picture and find_spec("matplotlib"):
        draw(results, picture)
    return results


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else "looped_transformer.png")
