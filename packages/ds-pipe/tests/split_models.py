"""A small language model, and what is split in it."""

from __future__ import annotations

from typing import Any

import torch
from ds_pipe.tensor import Plan, Rule
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCABULARY, TOKENS = 32, 8, 24, 16


class Attention(nn.Module):
    """Causal, with one matrix for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head_dim = WIDTH // HEADS

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        query, key, value = (
            each.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for each in self.qkv(hidden).chunk(3, -1)
        )
        scores = (query @ key.transpose(2, 3)) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, -1))


class Gated(nn.Module):
    """Two column layers with one input."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.dropout(functional.silu(self.gate(hidden)) * self.up(hidden)))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.second, self.mlp = nn.LayerNorm(WIDTH), Gated(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.first(hidden)))
        return hidden + self.mlp(self.second(hidden))


class Model(nn.Module):
    """A small language model."""

    def __init__(self, *, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LAYERS = (
    Rule(patterns=(r".*qkv$",), shape=(3, -1)),
    Rule(patterns=(r".*attention\.out$",), partition_type="row"),
    Rule(patterns=(r".*(gate|up)\.weight$",)),
    Rule(patterns=(r".*down$",), partition_type="row"),
    Rule(patterns=(r".*mlp\.dropout$",), partition_type="dropout"),
)
WHOLE = Plan(
    rules=(
        *LAYERS,
        Rule(patterns=("words$",), partition_type="vocab"),
        Rule(patterns=("head$",), gather_output=True),
    )
)


def model_of(dtype: torch.dtype, **settings: Any) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Model(**settings).to(dtype)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (4, TOKENS), generator=generator) for _ in range(3)]
