"""Which layers of a model are split, and how: rules by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["column", "row", "vocab", "dropout", "skip"]
"""``column`` and ``row``: a linear layer's outputs or inputs; ``vocab``: an embedding's rows; ``dropout``: an
``nn.Dropout`` inside a split region; ``skip``: leave whole what a later rule matches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How to split the modules that it matches; with the keys of DeepSpeed's ``layer_specs``."""

    patterns: tuple[str, ...]
    """Regular expressions, matched from the start of a module's name or of its weight's, ``a.b`` or ``a.b.weight``."""
    partition_type: Kind = "column"
    """What is done."""
    shape: tuple[int | tuple[int, ...], ...] | None = None
    """Of a column layer that consists of several matrices: ``(3, -1)`` where they are equally large, or the number of
    rows of each, ``((64, 16, 16), -1)``. None: it is one."""
    partition_dim: int | None = None
    """The dimension that is cut: 0 of a column layer and of an embedding, 1 of a row layer; of dropout, the dimension
    of its input that blocks or heads lie in, None being the last."""
    gather_output: bool = False
    """Whether all ranks get all outputs of a column layer."""
    together: int | None = None
    """Rows (of a row layer, columns) that stay in one block, such as those of a head; None: the first of
    :data:`HEAD_SIZES` that the module that the layer belongs to has as a number; 1 where it has none."""

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("a rule needs a pattern of the names that it is for; got none")
        want = {"column": 0, "vocab": 0, "row": 1}.get(self.partition_type)
        if want is not None and self.partition_dim not in (None, want):
            raise ValueError(f"{self.partition_type} layers are cut along dimension {want}; got {self.partition_dim}")
        if self.partition_type != "column" and (self.shape is not None or self.gather_output):
            raise ValueError(f"shape and gather_output are for column layers; got partition_type {self.partition_type}")
        if self.shape is not None and (len(self.shape) != 2 or self.shape[1] != -1):
            raise ValueError(f"shape is (number, -1) or ((rows, rows, ...), -1); got {self.shape}")

    def matches(self, name: str) -> bool:
        r"""Whether it is for the module ``name``.

        Example:
            >>> Rule(patterns=(r".*\.fc1\.weight$",)).matches("block.0.fc1")
            True
        """
        return any(_matches(pattern, name) for pattern in self.patterns)

    def sections(self, rows: int) -> tuple[int, ...]:
        """Return the sizes of the matrices that a layer with so many rows consists of.

        Raises:
            ValueError: They do not add up.

        Example:
            >>> Rule(patterns=("qkv",), shape=(3, -1)).sections(12)
            (4, 4, 4)
        """
        if self.shape is None:
            return (rows,)
        said = self.shape[0]
        sizes = (rows // said,) * said if isinstance(said, int) else said
        if sum(sizes) != rows:
            raise ValueError(f"shape {self.shape} is of {sum(sizes)} rows, and the layer has {rows}: give all of them")
        return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Rules for a whole model; the first that matches a module counts."""

    rules: tuple[Rule, ...]
    """In the order of precedence."""
    counts: Mapping[str, tuple[str, ...]] | None = None
    """By pattern of a module's whole name, its attributes that count what is split, such as ``num_heads``: they are
    divided by the number of ranks."""
    defaults: tuple[Rule, ...] = ()
    """For modules that no rule matches; they need not match any."""


def _llama_like(rest: str, attention: str = "self_attn") -> tuple[Rule, ...]:
    return (
        Rule(patterns=(rf"(.*\.)?{attention}\.[qkv]_proj$",), partition_type="column"),
        Rule(patterns=(rf"(.*\.)?{attention}\.o_proj$",), partition_type="row"),
        Rule(patterns=(rf"(.*\.)?mlp\.({rest})$",), partition_type="column"),
        Rule(patterns=(r"(.*\.)?mlp\.down_proj$",), partition_type="row"),
    )


HEAD_SIZES: Sequence[str] = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "d_kv")
"""Attributes in which attention layers, those of Hugging Face among them, have the size of a head."""

PRESETS: Mapping[str, tuple[Rule, ...]] = dict.fromkeys(
    ("llama", "mistral", "qwen2", "gemma", "gemma2", "olmo"), _llama_like("gate_proj|up_proj")
)
"""Rules for the decoder layers of models as Hugging Face names their parts."""

VOCABULARY: tuple[Rule, ...] = (
    Rule(patterns=(r"(.*\.)?embed_tokens$",), partition_type="vocab"),
    Rule(patterns=(r"(.*\.)?lm_head$",), partition_type="column", gather_output=True),
)
"""Rules for the embedding and the head of the same models."""


def preset(name: str, *, vocabulary: bool = False) -> Plan:
    """Return the plan of a family of models.

    Args:
        name: A key of :data:`PRESETS`, in any case of letters.
        vocabulary: Whether embedding and head are split, too.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> [rule.partition_type for rule in preset("Llama").rules]
        ['column', 'row', 'column', 'row']
    """
    if name.lower() not in PRESETS:
        raise ValueError(f"there is no preset {name!r} for tensor parallelism; there are {', '.join(PRESETS)}")
    return Plan(rules=(*PRESETS[name.lower()], *(VOCABULARY if vocabulary else ())))


def unmatched(rules: Sequence[Rule], names: Sequence[str]) -> list[str]:
    """Return the patterns that match none of ``names``."""
    return [
        pattern for rule in rules for pattern in rule.patterns if not any(_matches(pattern, name) for name in names)
    ]


def _matches(pattern: str, name: str) -> bool:
    return any(re.match(pattern, each) for each in (name, f"{name}.weight"))
