"""Layers of which each rank has some blocks.

[Note: Split regions]
Between a column layer and the row layer that follows it, a rank has its blocks of the last dimension only; what
stands between has to work on each element, or on each head, by itself. Outside, all ranks have the same values, and
the gradients of whatever parameters there are have the same bits on all of them. A product is computed block by
block, so that its operands have one shape whatever the number of ranks.

Column layers of one parent that are called with the same tensor, as those of queries, keys and values are, share its
copies: their gradients are added up block by block, and cross the ranks as one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import Blocks, Cut, Share
from .functions import copies, gathered, pieces, together, total


class Entrance:
    """Where tensors enter a split region; see [Note: Split regions].

    Args:
        share: Of this rank.
        parent: Within whose calls column layers share copies.
    """

    def __init__(self, share: Share, parent: nn.Module) -> None:
        self._share = share
        self._depth = 0
        self._given: Tensor | None = None
        self._copies: tuple[Tensor, ...] = ()
        parent.register_forward_pre_hook(self._enter)
        parent.register_forward_hook(self._leave, always_call=True)

    def copies(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return ``value`` once for each block of this rank."""
        if self._given is value:
            return self._copies
        found = copies(value, self._share.count, self._share.ranks)
        if self._depth and torch.is_grad_enabled():
            self._given, self._copies = value, found
        return found

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self._depth += 1

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        self._given, self._copies = None, ()


class _Layer(nn.Module):
    """A layer some of whose parameters are blocks."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share
        self._held: dict[str, list[str]] = {}  # names of this rank's blocks, by attribute

    def _hold(self, layer: nn.Module, attribute: str, cut: Cut, blocks: Blocks, name: str) -> None:
        """Register this rank's blocks of a parameter of ``layer``, if it has it."""
        param = layer._parameters[attribute]
        self._held[attribute] = [] if param is None else self._share.names(attribute)
        if param is not None:
            made = blocks.of(param, cut, f"{name}.{attribute}")
            for called, block in zip(self._held[attribute], made, strict=True):
                self.register_parameter(called, block)

    def _own(self, attribute: str) -> list[Tensor | None]:
        """Return this rank's blocks; None for each where there is no such parameter."""
        names = self._held[attribute]
        return [getattr(self, name) for name in names] if names else [None] * self._share.count


class _Linear(_Layer):
    """What linear layers have in common."""

    def __init__(self, linear: nn.Linear, share: Share) -> None:
        super().__init__(share)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def extra_repr(self) -> str:
        """Return the sizes of the whole layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, blocks={self._share.num_blocks}"


class ColumnParallelLinear(_Linear):
    """A linear layer whose outputs are split.

    Maps ``(..., in)`` to ``(..., out / T)``, this rank's blocks of the outputs; with ``gather_output``, to all of them.
    Memory: V / T of V blocks of weight and bias. The backward pass sums the input's gradient over the ranks; a gather
    sends the output's elements.

    Args:
        linear: What it is made of; its values are copied.
        blocks: Of the model.
        sections: Sizes of the matrices that ``linear`` consists of, along its outputs; None: one.
        gather_output: Whether all ranks get all outputs, as of a language model's head.
        entrance: Shared with the other column layers of one parent, see [Note: Split regions]; None: nothing is.
        name: For messages.

    Raises:
        ValueError: The outputs cannot be cut; or there are several sections, and they are to be gathered.

    Example:
        >>> from .sums import Ranks
        >>> layer = ColumnParallelLinear(nn.Linear(4, 8), Blocks(2, Ranks()))
        >>> [name for name, _ in layer.named_parameters()], layer(torch.ones(3, 4)).shape
        (['weight_0', 'weight_1', 'bias_0', 'bias_1'], torch.Size([3, 8]))

    Reference:
        Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019.
    """

    def __init__(
        self,
        linear: nn.Linear,
        blocks: Blocks,
        *,
        sections: tuple[int, ...] | None = None,
        gather_output: bool = False,
        entrance: Entrance | None = None,
        name: str = "linear",
    ) -> None:
        super().__init__(linear, blocks.share)
        cut = Cut(0, sections or (linear.out_features,))
        if gather_output:
            check_gathered(cut.sections, name)
        self._sizes = [size // blocks.share.num_blocks for size in cut.sections]
        self._gathers = gather_output
        self._entrance = entrance
        self._hold(linear, "weight", cut, blocks, name)
        self._hold(linear, "bias", cut, blocks, name)

    def forward(self, value: Tensor) -> Tensor:
        """Return this rank's outputs, or all."""
        share = self._share
        if self._entrance is None:
            given = copies(value, share.count, share.ranks)
        else:
            given = self._entrance.copies(value)
        weights, biases = self._own("weight"), self._own("bias")
        parts = [functional.linear(*each) for each in zip(given, weights, biases, strict=True)]  # type: ignore[arg-type]  # weights are there
        out = together(parts, self._sizes)
        return gathered(out, share.ranks) if self._gathers else out


class RowParallelLinear(_Linear):
    """A linear layer whose inputs are split.

    Maps ``(..., in / T)``, this rank's blocks of the inputs, to ``(..., out)``, the sum over all blocks, and the bias.
    Memory: V / T of V blocks of the weight, and the bias, which all ranks have. The forward pass sums the output over
    the ranks; the backward pass sends nothing.

    Args:
        linear: What it is made of; its values are copied, its bias is taken.
        blocks: Of the model.
        name: For messages.

    Raises:
        ValueError: The inputs cannot be cut.

    Example:
        >>> from .sums import Ranks
        >>> layer = RowParallelLinear(nn.Linear(4, 8), Blocks(2, Ranks()))
        >>> [name for name, _ in layer.named_parameters()], layer(torch.ones(3, 4)).shape
        (['bias', 'weight_0', 'weight_1'], torch.Size([3, 8]))

    Reference:
        As of :class:`ColumnParallelLinear`.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, blocks: Blocks, *, name: str = "linear") -> None:
        super().__init__(linear, blocks.share)
        self.register_parameter("bias", linear._parameters["bias"])
        self._hold(linear, "weight", Cut(1, (linear.in_features,)), blocks, name)

    def forward(self, value: Tensor) -> Tensor:
        """Return all outputs, the same on all ranks."""
        share = self._share
        width = self.in_features // share.ranks.size
        if value.shape[-1] != width:
            raise ValueError(
                f"a row layer takes this rank's {width} of {self.in_features} inputs; got {list(value.shape)}: the "
                "layers before it have to be split by column, and their outputs not gathered"
            )
        given = pieces(value, share.count)
        parts = [functional.linear(*each) for each in zip(given, self._own("weight"), strict=True)]  # type: ignore[arg-type]  # weights are there
        out = total(parts, share.ranks)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(_Layer):
    """An embedding whose rows are split.

    Maps token ids to ``(..., width)``, the same on all ranks; of each id one block has the row, and all others give
    zeros. Memory: V / T of V blocks of rows. The forward pass sums the output over the ranks; the backward pass sends
    nothing.

    Args:
        embedding: What it is made of; its values are copied.
        blocks: Of the model.
        name: For messages.

    Raises:
        ValueError: The rows cannot be cut.
        NotImplementedError: The embedding renormalises rows, scales gradients by frequency or has sparse ones, all of
            which need the whole table.
        IndexError: In ``forward``, on CPU: an id has no row on any rank. On a GPU an assertion of torch's fails.

    Example:
        >>> from .sums import Ranks
        >>> table = nn.Embedding(8, 2)
        >>> layer, ids = VocabParallelEmbedding(table, Blocks(4, Ranks())), torch.tensor([0, 3, 7])
        >>> torch.equal(layer(ids), table(ids))
        True

    Reference:
        As of :class:`ColumnParallelLinear`.
    """

    def __init__(self, embedding: nn.Embedding, blocks: Blocks, *, name: str = "embedding") -> None:
        super().__init__(blocks.share)
        check_table(embedding, name)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._rows = embedding.num_embeddings // blocks.share.num_blocks
        self._hold(embedding, "weight", Cut(0, (embedding.num_embeddings,)), blocks, name)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows."""
        share, parts = self._share, []
        # of an id that no block has, each looks up a row that it has not, and torch refuses as for a whole table
        elsewhere = torch.where((ids >= 0) & (ids < self.num_embeddings), 0, self._rows)
        for index, weight in zip(share.indices, self._own("weight"), strict=True):
            local = ids - index * self._rows
            inside = (local >= 0) & (local < self._rows)
            rows = self._looked_up(ids, local.where(inside, elsewhere), weight)
            if self.padding_idx is not None:  # that row has values, and no gradient
                rows = rows.where((ids != self.padding_idx).unsqueeze(-1), rows.detach())
            parts.append(rows.where(inside.unsqueeze(-1), 0.0))
        return total(parts, share.ranks)

    def extra_repr(self) -> str:
        """Return the sizes of the whole table."""
        return f"{self.num_embeddings}, {self.embedding_dim}, blocks={self._share.num_blocks}"

    def _looked_up(self, ids: Tensor, local: Tensor, weight: Tensor | None) -> Tensor:
        try:
            return functional.embedding(local, weight)  # type: ignore[arg-type]  # weights are there
        except IndexError:
            raise IndexError(
                f"ids are from 0 to {self.num_embeddings - 1}, the rows of the table; got from {int(ids.min())} to "
                f"{int(ids.max())}"
            ) from None


class BlockDropout(nn.Module):
    """Dropout inside a split region, whose masks depend on the block, not on the number of ranks.

    Each call draws one number from torch's default generator of the CPU, alike on all ranks, and the mask of a block
    from this number and the block's own.

    Args:
        p: Probability that an element is dropped.
        blocks: Of the model.
        dim: The dimension that blocks lie in.

    Example:
        >>> from .sums import Ranks
        >>> BlockDropout(0.5, Blocks(2, Ranks())).eval()(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, p: float, blocks: Blocks, *, dim: int = -1) -> None:
        super().__init__()
        self.p = p
        self._dim = dim
        self._share = blocks.share

    def forward(self, value: Tensor) -> Tensor:
        """Drop elements of this rank's blocks."""
        if not self.training or self.p == 0:
            return value
        seed = int(torch.randint(2**62, ()))
        generator = torch.Generator(value.device)
        keeps = []
        for index, block in zip(self._share.indices, value.chunk(self._share.count, self._dim), strict=True):
            # odd factors keep neighbours apart: a generator mixes its seed itself
            generator.manual_seed((seed + index * 0x9E3779B97F4A7C15) % 2**63)
            keeps.append(torch.rand(block.shape, generator=generator, device=value.device) >= self.p)
        keep = torch.cat(keeps, self._dim)
        return value * keep * (0.0 if self.p == 1 else 1 / (1 - self.p))


def check_gathered(sections: Sequence[int], name: str) -> None:
    """Refuse to gather outputs of several sections, which would come in the order of ranks."""
    if len(sections) > 1:
        raise ValueError(f"{name}: outputs of {len(sections)} sections are not gathered; got gather_output")


def check_table(embedding: nn.Embedding, name: str) -> None:
    """Refuse an embedding that needs its whole table."""
    settings = {
        "max_norm": embedding.max_norm,
        "scale_grad_by_freq": embedding.scale_grad_by_freq,
        "sparse": embedding.sparse,
    }
    for setting, value in settings.items():
        if value:
            raise NotImplementedError(
                f"{name}: {setting}={value!r} needs the whole table: leave the embedding whole, or the setting out"
            )
