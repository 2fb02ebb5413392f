"""Blocks of parameters: how a tensor is cut into them, and put together again.

[Note: Blocks]
A parameter is cut along one dimension into V blocks, equally large, by the *cut*: a dimension and *sections*, the sizes
of the matrices that lie one behind the other in it (one, or three in a fused projection of queries, keys and values).
Block b has the b-th of V equal parts of every section. It is an ordinary parameter, and its name has the number that
it has among all blocks, ``weight_2``: so ranks that have other blocks have parameters of other names, as stages of a
pipeline do, and whatever keeps state by name does not care how many ranks there are. What was cut is not kept: a
layer that has its blocks knows its :class:`Share`, and what was made of a parameter is known as long as somebody else
has that parameter.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .sums import Ranks


class Cut(NamedTuple):
    """See [Note: Blocks]."""

    dim: int
    sections: tuple[int, ...]  # add up to the size in ``dim``

    def block(self, whole: Tensor, index: int, num_blocks: int) -> Tensor:
        """Return a contiguous copy of one block.

        Example:
            >>> whole = torch.arange(8).view(8, 1)
            >>> Cut(0, (4, 4)).block(whole, 1, 2).flatten()
            tensor([2, 3, 6, 7])
        """
        parts = [
            section.narrow(self.dim, index * (size // num_blocks), size // num_blocks)
            for section, size in zip(whole.split(self.sections, self.dim), self.sections, strict=True)
        ]
        return torch.cat(parts, self.dim)

    def whole(self, blocks: Sequence[Tensor]) -> Tensor:
        """Put all blocks together again.

        Example:
            >>> whole, cut = torch.arange(8), Cut(0, (4, 4))
            >>> bool((cut.whole([cut.block(whole, index, 4) for index in range(4)]) == whole).all())
            True
        """
        sizes = [size // len(blocks) for size in self.sections]
        parts = [block.split(sizes, self.dim) for block in blocks]
        return torch.cat([part[section] for section in range(len(sizes)) for part in parts], self.dim)


@dataclass(frozen=True, slots=True)
class Share:
    """Which blocks of each layer a rank has.

    Example:
        >>> Share(4, range(2, 4), Ranks()).names("weight")
        ['weight_2', 'weight_3']
    """

    num_blocks: int  # of a layer
    indices: range  # of this rank's
    ranks: Ranks

    @property
    def count(self) -> int:
        """Number of this rank's blocks."""
        return len(self.indices)

    def names(self, attribute: str) -> list[str]:
        """Return what this rank's blocks of an attribute are called."""
        return [block_name(attribute, index) for index in self.indices]


class Blocks:
    """Cuts the parameters of one model into this rank's blocks; see [Note: Blocks].

    Args:
        num_blocks: V of [Note: Tree over blocks].
        ranks: That have them.

    Raises:
        ValueError: The number is no power of two, or less than there are ranks.

    Example:
        >>> blocks = Blocks(2, Ranks())
        >>> [list(block.shape) for block in blocks.of(nn.Parameter(torch.ones(4, 3)), Cut(0, (4,)), "weight")]
        [[2, 3], [2, 3]]
    """

    def __init__(self, num_blocks: int, ranks: Ranks) -> None:
        if num_blocks < 1 or num_blocks & (num_blocks - 1):
            raise ValueError(f"a layer is split into a power of two of blocks (1, 2, 4, ...); got {num_blocks}")
        if num_blocks % ranks.size:
            raise ValueError(
                f"{ranks.size} tensor-parallel ranks do not divide {num_blocks} blocks: take more blocks or fewer ranks"
            )
        count = num_blocks // ranks.size
        self.share = Share(num_blocks, range(ranks.rank * count, (ranks.rank + 1) * count), ranks)
        # by what they were cut from, which these do not keep alive
        self.made: MutableMapping[nn.Parameter, list[nn.Parameter]] = WeakTensorKeyDictionary()
        self.cuts: MutableMapping[nn.Parameter, Cut] = WeakTensorKeyDictionary()

    def of(self, param: nn.Parameter, cut: Cut, name: str) -> list[nn.Parameter]:
        """Return this rank's blocks of ``param``, the same ones whenever it is asked for.

        Args:
            param: Whole.
            cut: How.
            name: For messages.

        Raises:
            ValueError: It does not come out even, or the parameter is tied to another one that is cut otherwise.
        """
        self.claim(param, cut, name)
        if param not in self.made:
            self.check(cut, name)
            self.made[param] = [
                nn.Parameter(cut.block(param.detach(), index, self.share.num_blocks), requires_grad=param.requires_grad)
                for index in self.share.indices
            ]
        return self.made[param]

    def claim(self, param: nn.Parameter, cut: Cut, name: str) -> None:
        """Say how ``param`` will be cut; raise if it is tied to another one that will be cut otherwise."""
        known = self.cuts.setdefault(param, cut)
        if known != cut:
            raise ValueError(
                f"{name} is tied to a weight that is split along dimension {known.dim} into sections "
                f"{list(known.sections)}; got dimension {cut.dim} and sections {list(cut.sections)}: split both alike, "
                "or neither"
            )

    def check(self, cut: Cut, name: str, together: int = 1) -> None:
        """Raise unless each section comes to V equal parts of whole runs of ``together`` elements."""
        num_blocks = self.share.num_blocks
        for size in cut.sections:
            if size % (num_blocks * together):
                each = f" of {together} each" if together > 1 else ""
                what = f"{size // together} heads" if together > 1 else f"{size} elements in dimension {cut.dim}"
                raise ValueError(
                    f"{name}: {what}{each} cannot be cut into {num_blocks} equal blocks: take fewer blocks, or "
                    "leave the layer whole (partition_type 'skip')"
                )


def block_name(attribute: str, index: int) -> str:
    """Return what one block of an attribute is called.

    Example:
        >>> block_name("weight", 2)
        'weight_2'
    """
    return f"{attribute}_{index}"
