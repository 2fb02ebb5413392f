"""Small models that have what real ones have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(attended.transpose(1, 2).reshape(batch, length, dim)))
        return x + self.dropout(self.out(F.gelu(self.fc(self.norm2(x)), approximate="tanh")))


class Transformer(nn.Module):
    """Decoder-only language model; returns the loss.

    Args:
        vocab: Number of tokens.
        dim: Width.
        layers: Number of blocks.
        heads: Attention heads.
        context: Longest sequence.
        tied: Whether the head is the embedding.
        dropout: Probability.
    """

    def __init__(
        self,
        vocab: int = 61,
        dim: int = 32,
        layers: int = 3,
        *,
        heads: int = 4,
        context: int = 64,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def micro_batch(index: int, *, vocab: int = 61, size: int = 2, length: int = 17) -> Tensor:
    """Return global micro-batch ``index``: the same on whichever rank it is asked for."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(vocab, (size, length), generator=generator)


def seeded(seed: int = 7, **settings: object) -> Transformer:
    """Return a transformer with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return Transformer(**settings)  # type: ignore[arg-type]  # settings are those of the constructor
