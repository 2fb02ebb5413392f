"""Splits the layers of a model into blocks, in place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from .blocks import Blocks, Cut, block_name
from .layers import BlockDropout, ColumnParallelLinear, Entrance, RowParallelLinear, VocabParallelEmbedding
from .plan import Kind, Plan, Rule, unmatched
from .sums import Ranks

_M = TypeVar("_M", bound=nn.Module)


class _Work(NamedTuple):
    """A module to be replaced."""

    name: str  # its first one
    module: nn.Module
    parent: nn.Module
    rule: Rule


class Split:
    """What :func:`split` has made of a model.

    Args:
        blocks: Of the model.
        names: Names of all parameters, tied ones with all of theirs, by parameter, before anything was replaced.
        unmatched: Patterns of the plan that no module has matched.
    """

    def __init__(self, blocks: Blocks, names: Mapping[nn.Parameter, Sequence[str]], unmatched: Sequence[str]) -> None:
        self.num_blocks = blocks.num_blocks
        self.unmatched = tuple(unmatched)
        self.blocks: Mapping[nn.Parameter, int] = {
            block: index for made in blocks.made.values() for index, block in zip(blocks.indices, made, strict=True)
        }
        """The parameters that this rank alone has, each with the number of its block."""
        self.whole_names: Mapping[str, Sequence[str]] = {called[0]: called for called in names.values()}
        """All names of each parameter of the model before it was split, by the first one."""
        self.whole_shapes = {called[0]: param.shape for param, called in names.items()}
        self._made = dict(blocks.made)
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
    whole model, and one tensor. Afterwards all ranks call the model with the same inputs, and compute the same loss;
    parameters that are not split have the same gradients on all ranks. See [Note: Tree over blocks] for bits.

    Args:
        module: Built in the same way on each rank, in memory.
        plan: What to split.
        group: The ranks, a power of two; None: this process alone.
        num_blocks: Blocks of each layer, a power of two of at least as many as there are ranks; None: one for each.
            What is computed, and what a checkpoint holds, depends on this number, and not on the number of ranks.

    Raises:
        ValueError: A pattern matches nothing, a layer cannot be cut evenly, a tied weight would be split in one place
            and not in another, or the model has no values.
        TypeError: A rule is for another kind of layer than the one it matches.

    Example:
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
    blocks = Blocks(num_blocks or ranks.size, ranks)
    _, missed = _planned(module, plan)
    if missed:
        raise ValueError(no_match(missed, module))
    return split_part(module, plan, blocks)


def no_match(patterns: Sequence[str], module: nn.Module) -> str:
    """Return what to say about patterns that match nothing."""
    linears = [name for name, each in module.named_modules() if isinstance(each, (nn.Linear, nn.Embedding))]
    return (
        f"no module of the model matches {', '.join(map(repr, patterns))}; it has {', '.join(linears[:20])}: patterns "
        "are matched from the start of a name"
    )


def split_part(module: nn.Module, plan: Plan, blocks: Blocks, *, keep: Collection[str] = ()) -> Split:
    """As :func:`split`, for a part of a model, in which patterns need not match anything.

    Args:
        module: The part.
        plan: Of the whole model.
        blocks: For this part.
        keep: Names of parameters that other parts use, too, and that have to stay whole.
    """
    empty = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(
            f"layers are split with their values, and {empty[0]} is on the meta device: build it in memory"
        )
    names = _names(module)
    works, missed = _planned(module, plan)
    for work in works:
        _check_even(work, blocks)
    _check_ties(module, works, frozenset(keep), names)
    for tensor in [*module.parameters(), *module.buffers()]:
        blocks.ranks.take(tensor.detach())
    entrances: dict[nn.Module, Entrance] = {}
    for work in works:
        made = _replacement(work, blocks, entrances)
        for parent in module.modules():
            for child, each in list(parent._modules.items()):
                if each is work.module:
                    parent._modules[child] = made.train(work.module.training)
    _divide(module, plan.counts or {}, blocks.ranks.size)
    return Split(blocks, names, missed)


def _names(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return names


def _planned(module: nn.Module, plan: Plan) -> tuple[list[_Work], list[str]]:
    """Return what is to be replaced, and which patterns have matched nothing."""
    modules = dict(module.named_modules(remove_duplicate=False))
    works: dict[nn.Module, _Work] = {}
    for name, each in modules.items():
        rule = next((rule for rule in (*plan.rules, *plan.defaults) if rule.matches(name)), None) if name else None
        if rule is not None and rule.partition_type != "skip" and each not in works:
            works[each] = _Work(name, each, modules[name.rpartition(".")[0]], rule)
    missed = unmatched(plan.rules, [name for name in modules if name])
    missed += [pattern for pattern in plan.counts or () if not any(re.fullmatch(pattern, name) for name in modules)]
    return list(works.values()), missed


def _check_even(work: _Work, blocks: Blocks) -> None:
    """Refuse, before anything is changed, what is of another kind or does not come out even."""
    kind = work.rule.partition_type
    if kind == "column":
        blocks.check(Cut(0, work.rule.sections(_checked(work, nn.Linear).out_features)), work.name, _together(work))
    elif kind == "row":
        blocks.check(Cut(1, (_checked(work, nn.Linear).in_features,)), work.name, _together(work))
    elif kind == "vocab":
        blocks.check(Cut(0, (_checked(work, nn.Embedding).num_embeddings,)), work.name)
    else:
        _checked(work, nn.Dropout)


def _check_ties(
    module: nn.Module, works: Sequence[_Work], keep: frozenset[str], names: Mapping[nn.Parameter, Sequence[str]]
) -> None:
    """Refuse to split a weight that somebody else has whole."""
    cut = {work.module: _CUT[work.rule.partition_type] for work in works}
    inside: dict[nn.Parameter, str] = {}
    outside: dict[nn.Parameter, str] = {}
    for path, each in module.named_modules():
        for attribute, param in each.named_parameters(recurse=False):
            where = inside if attribute in cut.get(each, ()) else outside
            where.setdefault(param, f"{path}.{attribute}")
    for param, name in inside.items():
        if param in outside:
            raise ValueError(
                f"{name} is to be split and is tied to {outside[param]}, which is not: have rules for both or none"
            )
        if not keep.isdisjoint(names[param]):
            raise ValueError(
                f"{name} is to be split, and another stage of the pipeline uses it, too: leave it whole "
                "(partition_type 'skip')"
            )


def _replacement(work: _Work, blocks: Blocks, entrances: dict[nn.Module, Entrance]) -> nn.Module:
    make = {"column": _column, "row": _row, "vocab": _vocab, "dropout": _dropout}[work.rule.partition_type]
    return make(work, blocks, entrances)


def _divide(module: nn.Module, counts: Mapping[str, Sequence[str]], num_ranks: int) -> None:
    """Divide attributes that count what is split."""
    for pattern, attributes in counts.items():
        found = [(name, each) for name, each in module.named_modules() if re.fullmatch(pattern, name)]
        for name, each in found:
            for attribute in attributes:
                value = vars(each).get(attribute)
                if not isinstance(value, int) or value % num_ranks:
                    raise ValueError(
                        f"{name}.{attribute} is to be divided by {num_ranks} ranks: it has to be a multiple; got "
                        f"{value!r}"
                    )
                setattr(each, attribute, value // num_ranks)


# Kinds of layers #


def _column(work: _Work, blocks: Blocks, entrances: dict[nn.Module, Entrance]) -> nn.Module:
    linear = _checked(work, nn.Linear)
    if work.parent not in entrances:
        entrances[work.parent] = Entrance(blocks, work.parent)
    return ColumnParallelLinear(
        linear,
        blocks,
        sections=work.rule.sections(linear.out_features),
        gather_output=work.rule.gather_output,
        entrance=entrances[work.parent],
        name=work.name,
    )


def _row(work: _Work, blocks: Blocks, _entrances: object) -> nn.Module:
    return RowParallelLinear(_checked(work, nn.Linear), blocks, name=work.name)


def _vocab(work: _Work, blocks: Blocks, _entrances: object) -> nn.Module:
    return VocabParallelEmbedding(_checked(work, nn.Embedding), blocks, name=work.name)


def _dropout(work: _Work, blocks: Blocks, _entrances: object) -> nn.Module:
    dim = -1 if work.rule.partition_dim is None else work.rule.partition_dim
    return BlockDropout(_checked(work, nn.Dropout).p, blocks, dim=dim)


_CUT: Mapping[Kind, Sequence[str]] = {
    "column": ("weight", "bias"),
    "row": ("weight",),
    "vocab": ("weight",),
    "dropout": (),
    "skip": (),
}
"""Which parameters of a layer are cut, by what is done with it."""


def _checked(work: _Work, kind: type[_M]) -> _M:
    if not isinstance(work.module, kind):
        raise TypeError(
            f"{work.name} is to be split by {work.rule.partition_type}, which is for nn.{kind.__name__}; got a "
            f"{type(work.module).__name__}"
        )
    return work.module


def _together(work: _Work) -> int:
    """Return how many rows, or columns, stay in one block."""
    said = work.rule.together
    found = vars(work.parent).get("head_dim") if said is None and not work.rule.gather_output else said
    return found if isinstance(found, int) else 1
