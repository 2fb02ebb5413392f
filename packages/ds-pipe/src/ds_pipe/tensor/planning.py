"""What is to be split in a model, found by rules, and checked before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import nn

from .blocks import Blocks, Cut
from .layers import check_gathered, check_table
from .plan import HEAD_SIZES, Plan, Rule, unmatched

_M = TypeVar("_M", bound=nn.Module)
_SHOWN = 20  # names in a message


class Work(NamedTuple):
    """A module to be replaced."""

    name: str  # its first one
    module: nn.Module
    parent: nn.Module
    rule: Rule


class Count(NamedTuple):
    """An attribute that counts what is split, and what it will be."""

    module: str  # its name
    attribute: str
    value: int


class Found(NamedTuple):
    """What a plan means for a model; nothing is changed yet, and nothing of it can be refused any more."""

    names: Mapping[nn.Parameter, Sequence[str]]  # of all parameters, tied ones with all of theirs
    works: Sequence[Work]
    counts: Sequence[Count]
    unmatched: tuple[str, ...]  # patterns of the plan that no module matches
    layers: tuple[str, ...]  # names of the modules that rules can be for


def find(module: nn.Module, plan: Plan, blocks: Blocks, *, keep: Collection[str] = ()) -> Found:
    """Return what is to be done; changes nothing, and does not communicate.

    Args:
        module: A model, or a part of one.
        plan: Of the whole model.
        blocks: For this part.
        keep: Names of parameters that other parts use, too, and that have to stay whole.

    Raises:
        ValueError: A layer cannot be cut evenly, a tied weight would be split in one place and not, or otherwise, in
            another, an attribute cannot be divided, or the model has no values.
        TypeError: A rule is for another kind of layer than the one it matches.
        NotImplementedError: A layer cannot do what it does on parts of its weight.
    """
    empty = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(
            f"layers are split with their values, and {empty[0]} is on the meta device: build it in memory"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    works, missed = _planned(module, plan)
    cuts = {work.module: _cuts(work) for work in works}
    for work in works:
        _check(work, cuts[work.module], blocks)
    _check_ties(module, cuts, frozenset(keep), names)
    layers = tuple(
        name
        for name, each in module.named_modules()
        if name and isinstance(each, (nn.Linear, nn.Embedding, nn.Dropout))
    )
    return Found(names, works, _counts(module, plan, blocks.share.ranks.size), tuple(missed), layers)


def no_match(patterns: Sequence[str], layers: Sequence[str]) -> str:
    """Return what to say about patterns that match nothing in a model that has ``layers``.

    Example:
        >>> no_match(["feet"], ["head"])
        "no module of the model matches 'feet'; it has head: patterns are matched from the start of a name"
    """
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return (
        f"no module of the model matches {', '.join(map(repr, patterns))}; it has "
        f"{', '.join(layers[:_SHOWN]) or 'no layer that can be split'}{more}: patterns are matched from the start of a "
        "name"
    )


def checked(work: Work, kind: type[_M]) -> _M:
    """Return the module of ``work``, if it is what its rule is for."""
    if not isinstance(work.module, kind):
        raise TypeError(
            f"{work.name} is to be split by {work.rule.partition_type}, which is for nn.{kind.__name__}; got a "
            f"{type(work.module).__name__}"
        )
    return work.module


def _planned(module: nn.Module, plan: Plan) -> tuple[list[Work], list[str]]:
    """Return what is to be replaced, and which patterns have matched nothing."""
    modules = dict(module.named_modules(remove_duplicate=False))
    works: dict[nn.Module, Work] = {}
    for name, each in modules.items():
        rule = next((rule for rule in (*plan.rules, *plan.defaults) if rule.matches(name)), None) if name else None
        if rule is not None and rule.partition_type != "skip" and each not in works:
            works[each] = Work(name, each, modules[name.rpartition(".")[0]], rule)
    missed = unmatched(plan.rules, [name for name in modules if name])
    missed += [pattern for pattern in plan.counts or () if not any(re.fullmatch(pattern, name) for name in modules)]
    return list(works.values()), missed


def _cuts(work: Work) -> dict[str, Cut]:
    """Return how the parameters of a layer are cut, by attribute."""
    kind = work.rule.partition_type
    if kind == "column":
        cut = Cut(0, work.rule.sections(checked(work, nn.Linear).out_features))
        return {"weight": cut, "bias": cut}
    if kind == "row":
        return {"weight": Cut(1, (checked(work, nn.Linear).in_features,))}
    if kind == "vocab":
        return {"weight": Cut(0, (checked(work, nn.Embedding).num_embeddings,))}
    checked(work, nn.Dropout)
    return {}


def _check(work: Work, cuts: Mapping[str, Cut], blocks: Blocks) -> None:
    """Refuse what does not come out even, what is cut otherwise elsewhere, and what needs its whole weight."""
    for attribute, cut in cuts.items():
        blocks.check(cut, work.name, _together(work))
        param = work.module._parameters[attribute]
        if param is not None:
            blocks.claim(param, cut, f"{work.name}.{attribute}")
    if work.rule.gather_output:
        check_gathered(cuts["weight"].sections, work.name)
    if work.rule.partition_type == "vocab":
        check_table(checked(work, nn.Embedding), work.name)


def _check_ties(
    module: nn.Module,
    cuts: Mapping[nn.Module, Collection[str]],
    keep: frozenset[str],
    names: Mapping[nn.Parameter, Sequence[str]],
) -> None:
    """Refuse to split a weight that somebody else has whole."""
    inside: dict[nn.Parameter, str] = {}
    outside: dict[nn.Parameter, str] = {}
    for path, each in module.named_modules():
        for attribute, param in each.named_parameters(recurse=False):
            where = inside if attribute in cuts.get(each, ()) else outside
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


def _counts(module: nn.Module, plan: Plan, num_ranks: int) -> list[Count]:
    """Return what attributes that count what is split will be."""
    found = []
    for pattern, attributes in (plan.counts or {}).items():
        for name, each in module.named_modules():
            for attribute in attributes if re.fullmatch(pattern, name) else ():
                if attribute not in vars(each):
                    numbers = [key for key, value in vars(each).items() if type(value) is int]
                    raise ValueError(
                        f"counts names {attribute!r} of {name or 'the model'}, which has none; its numbers are "
                        f"{', '.join(numbers) or 'none'}"
                    )
                value = vars(each)[attribute]
                if type(value) is not int or value % num_ranks:
                    raise ValueError(
                        f"{name}.{attribute} is to be divided by {num_ranks} ranks: it has to be a multiple; got "
                        f"{value!r}"
                    )
                found.append(Count(name, attribute, value // num_ranks))
    return found


def _together(work: Work) -> int:
    """Return how many rows, or columns, stay in one block."""
    if work.rule.together is not None or work.rule.gather_output or work.rule.partition_type == "vocab":
        return work.rule.together or 1
    has = vars(work.parent)
    return next((has[name] for name in HEAD_SIZES if isinstance(has.get(name), int)), 1)
