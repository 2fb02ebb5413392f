"""Splits the layers of a model into blocks, in place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from .blocks import Blocks, block_name
from .layers import BlockDropout, ColumnParallelLinear, Entrance, RowParallelLinear, VocabParallelEmbedding
from .plan import Plan
from .planning import Found, Work, checked, find, no_match
from .sums import Ranks


class Split:
    """What :func:`split` has made of a model. It keeps none of the parameters there were before.

    Args:
        blocks: Of the model.
        names: Names of all parameters, tied ones with all of theirs, by parameter, before anything was replaced.
    """

    def __init__(self, blocks: Blocks, names: Mapping[nn.Parameter, Sequence[str]]) -> None:
        self.num_blocks = blocks.share.num_blocks
        self.blocks: Mapping[nn.Parameter, int] = {
            block: index
            for made in blocks.made.values()
            for index, block in zip(blocks.share.indices, made, strict=True)
        }
        """The parameters that this rank alone has, each with the number of its block."""
        self.whole_names: Mapping[str, Sequence[str]] = {called[0]: called for called in names.values()}
        """All names of each parameter of the model before it was split, by the first one."""
        self.whole_shapes = {called[0]: param.shape for param, called in names.items()}
        self._made = blocks.made
        self._cuts = {names[param][0]: cut for param, cut in blocks.cuts.items()}

    def renewed(self, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return parameters with this rank's blocks in place of those that were split."""
        return [block for param in params for block in self._made.get(param, [param])]

    def parts(self, name: str) -> list[str]:
        """Return the names of all blocks of what was the parameter ``name``; the name itself where it is whole."""
        if name not in self._cuts:
            return [name]
        path, _, attribute = name.rpartition(".")
        return [
            f"{path}.{block_name(attribute, index)}" if path else block_name(attribute, index)
            for index in range(self.num_blocks)
        ]

    def merged(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return what was the parameter ``name`` from all of its :meth:`parts`."""
        return self._cuts[name].whole(parts) if name in self._cuts else parts[0]


def split(
    module: nn.Module, plan: Plan, *, group: dist.ProcessGroup | None = None, num_blocks: int | None = None
) -> Split:
    """Replace the layers that ``plan`` names by ones of which each rank has its blocks, in place; all ranks call it.

    All parameters and buffers get the first rank's values: one broadcast of the whole model. Memory, while it runs: the
    whole model, its blocks, and one tensor; afterwards what was split is freed, unless somebody else has it.
    Afterwards all ranks call the model with the same inputs, and compute the same loss; parameters that are not split
    have the same gradients on all ranks. See [Note: Tree over blocks] for bits.

    Args:
        module: Built in the same way on each rank, in memory. It is as it was where anything is refused.
        plan: What to split.
        group: The ranks, a power of two; None: this process alone.
        num_blocks: Blocks of each layer, a power of two of at least as many as there are ranks; None: one for each.
            What is computed, and what a checkpoint holds, depends on this number, and not on the number of ranks.

    Raises:
        ValueError: A pattern matches nothing, a layer cannot be cut evenly, a tied weight would be split in one place
            and not in another, or the model has no values.
        TypeError: A rule is for another kind of layer than the one it matches.
        NotImplementedError: A layer cannot do what it does on parts of its weight.

    Example:
        >>> from .plan import Rule
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> plan = Plan(rules=(Rule(patterns=("0$",)), Rule(patterns=("2$",), partition_type="row")))
        >>> made = split(model, plan, num_blocks=2)
        >>> [name for name, _ in model.named_parameters()]
        ['0.weight_0', '0.weight_1', '0.bias_0', '0.bias_1', '2.bias', '2.weight_0', '2.weight_1']
        >>> made.parts("2.weight")
        ['2.weight_0', '2.weight_1']

    Reference:
        Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019.
    """
    ranks = Ranks(group)
    planned = PlannedSplit(module, plan, Blocks(ranks.size if num_blocks is None else num_blocks, ranks))
    if planned.unmatched:
        raise ValueError(no_match(planned.unmatched, planned.layers))
    return planned.split()


class PlannedSplit:
    """A model, or a part of one, that can be split; nothing is changed yet, and nothing was communicated.

    Args:
        module: It.
        plan: Of the whole model; its patterns need not match anything in this part.
        blocks: For this part.
        keep: Names of parameters that other parts use, too, and that have to stay whole.

    Raises:
        ValueError: As :func:`split`; and so for other errors.
    """

    def __init__(self, module: nn.Module, plan: Plan, blocks: Blocks, *, keep: Collection[str] = ()) -> None:
        self._module = module
        self._blocks = blocks
        self._found: Found = find(module, plan, blocks, keep=keep)
        self.unmatched = self._found.unmatched
        """Patterns of the plan that no module matches."""
        self.layers = self._found.layers
        """Names of the modules that rules can be for."""

    def split(self) -> Split:
        """Do it; all ranks call it."""
        module, blocks = self._module, self._blocks
        for tensor in [*module.parameters(), *module.buffers()]:
            blocks.share.ranks.take(tensor.detach())
        entrances: dict[nn.Module, Entrance] = {}
        for work in self._found.works:
            made = _replacement(work, blocks, entrances)
            for parent in module.modules():
                for child, each in list(parent._modules.items()):
                    if each is work.module:
                        parent._modules[child] = made.train(work.module.training)
        for name, attribute, value in self._found.counts:
            setattr(module.get_submodule(name), attribute, value)
        return Split(blocks, self._found.names)


# Kinds of layers #


def _replacement(work: Work, blocks: Blocks, entrances: dict[nn.Module, Entrance]) -> nn.Module:
    make = {"column": _column, "row": _row, "vocab": _vocab, "dropout": _dropout}[work.rule.partition_type]
    return make(work, blocks, entrances)


def _column(work: Work, blocks: Blocks, entrances: dict[nn.Module, Entrance]) -> nn.Module:
    linear = checked(work, nn.Linear)
    if work.parent not in entrances:
        entrances[work.parent] = Entrance(blocks.share, work.parent)
    return ColumnParallelLinear(
        linear,
        blocks,
        sections=work.rule.sections(linear.out_features),
        gather_output=work.rule.gather_output,
        entrance=entrances[work.parent],
        name=work.name,
    )


def _row(work: Work, blocks: Blocks, _entrances: object) -> nn.Module:
    return RowParallelLinear(checked(work, nn.Linear), blocks, name=work.name)


def _vocab(work: Work, blocks: Blocks, _entrances: object) -> nn.Module:
    return VocabParallelEmbedding(checked(work, nn.Embedding), blocks, name=work.name)


def _dropout(work: Work, blocks: Blocks, _entrances: object) -> nn.Module:
    dim = -1 if work.rule.partition_dim is None else work.rule.partition_dim
    return BlockDropout(checked(work, nn.Dropout).p, blocks, dim=dim)
