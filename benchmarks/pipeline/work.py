"""What every contender trains: a stack of transformer blocks, cut into stages, and the micro-batches of a step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MICRO_BATCHES = 8
LR = 1e-6


class Block(nn.Module):
    """Attention and a feed-forward layer, with norms before and sums around."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // 64
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.qkv(self.norm(hidden)).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))


class Work(NamedTuple):
    """One training step."""

    dim: int
    tokens: int  # of a micro-batch
    parts: tuple[int, ...]  # blocks in each of four parts of the model

    @classmethod
    def of(cls, options: argparse.Namespace) -> Work:
        return cls(options.dim, options.tokens, tuple(options.parts))

    def blocks(self) -> list[nn.Module]:
        torch.manual_seed(0)
        return [Block(self.dim) for _ in range(sum(self.parts))]

    def cut(self, blocks: Sequence[nn.Module], num_stages: int) -> list[nn.Module]:
        """Return stages: the parts, or pairs of them."""
        each = len(self.parts) // num_stages
        counts = [sum(self.parts[stage * each : (stage + 1) * each]) for stage in range(num_stages)]
        starts = [sum(counts[:stage]) for stage in range(num_stages)]
        return [nn.Sequential(*blocks[start : start + count]) for start, count in zip(starts, counts, strict=True)]

    def batches(self) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(1)
        shape = (1, self.tokens, self.dim)
        made = [[torch.randn(shape, generator=generator) for _ in range(MICRO_BATCHES)] for _ in range(2)]
        return made[0], made[1]
