"""Models of ds-kernels' transformer layers and loss under ds-zero: the same bits on any number of ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_kernels.layers import TransformerConfig, TransformerLayer
from ds_kernels.ops import linear_cross_entropy
from ds_testkit import Rank, RankPool
from ds_testkit.state import Exported, assembled, assert_same_bits, exported
from torch import Tensor, nn
from torch.utils.data import Dataset

pytestmark = pytest.mark.rung_c


class Sequences(Dataset[Tensor]):
    """32 sequences of 17 tokens."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(61, (17,), generator=torch.Generator().manual_seed(index))


class Model(nn.Module):
    """Decoder-only language model whose head is its embedding; returns the loss."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(61, config.hidden_size)
        self.layers = nn.ModuleList([TransformerLayer(config) for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return linear_cross_entropy(x[:, :-1], self.tokens.weight, tokens[:, 1:], z_loss=1e-3)


class Outcome(NamedTuple):
    losses: list[float]
    pieces: list[Exported]


def train(rank: Rank, stage: int, precision: str, settings: dict[str, Any]) -> Outcome:
    torch.manual_seed(7)
    model = Model(TransformerConfig(hidden_size=32, heads=4, causal=True, hidden_dropout_ratio=0.1, **settings))
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    engine, _, loader, _ = ds_core.initialize(model, config=config, training_data=Sequences(), group=rank.group)
    losses = []
    while engine.global_steps < 6:
        for batch in loader:
            loss = engine(batch)
            engine.backward(loss)
            losses.append(loss.item())
            if engine.step().boundary and engine.global_steps == 6:
                break
    return Outcome(losses, exported(engine._sharded))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gelu_checkpoint": True, "attn_dropout_ratio": 0.1}, {"pre_layer_norm": False, "activation": "swiglu"}],
    ids=str,
)
def test_two_ranks_at_stage_3_are_one(ranks: RankPool, settings: dict[str, Any], precision: str) -> None:
    (want,) = ranks.run(train, 0, precision, settings, size=1)
    got = ranks.run(train, 3, precision, settings, size=2)
    assert_same_bits(assembled(outcome.pieces for outcome in got), assembled([want.pieces]))
    assert [got[index % 2].losses[index // 2] for index in range(len(want.losses))] == want.losses
    assert want.losses[-1] < want.losses[0]
