"""Settings of tensor parallelism, as a configuration has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .plan import PRESETS, VOCABULARY, Plan, Rule, preset

_DEFAULT = "llama"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionConfig:
    """Which layers are split, by name."""

    use_default_specs: bool = True
    """Whether layers that no rule of ``layer_specs`` matches are split where they are named as in Llama. Without it,
    the rules are those of ``layer_specs``, of ``preset_model`` and of ``vocab_parallel_lm_head``, and there has to be
    one."""
    layer_specs: tuple[Rule, ...] = ()
    """Rules; the first one that matches a layer counts. Each of their patterns has to match something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorConfig:
    """Settings of the plugin ``tensor``."""

    autotp_size: int = 1
    """Ranks that a layer is split over, a power of two."""
    blocks: int | None = None
    """Blocks that a layer consists of, a power of two; None: one for each rank. More of them allow going on with more
    ranks later: results and checkpoints depend on this number, and not on the number of ranks."""
    preset_model: str | None = None
    """Family of models whose layers are split; None: those of ``partition_config``, or where it has no rule and does
    not say otherwise, ``llama``."""
    partition_config: PartitionConfig = field(default_factory=PartitionConfig)
    """Rules by name."""
    vocab_parallel_lm_head: bool = False
    """Whether the embedding and the head of a preset are split along the vocabulary, too."""
    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By pattern of a module's whole name, its attributes that count heads and the like, to be divided by the number
    of ranks."""

    def __post_init__(self) -> None:
        for name, value in (("autotp_size", self.autotp_size), ("blocks", self.blocks)):
            if value is not None and (value < 1 or value & (value - 1)):
                raise ValueError(f"{name} must be a power of two (1, 2, 4, ...), got {value}")
        if self.blocks is not None and self.blocks < self.autotp_size:
            raise ValueError(f"{self.autotp_size} ranks (autotp_size) do not divide blocks = {self.blocks}")
        if self.preset_model is not None and self.preset_model.lower() not in PRESETS:
            preset(self.preset_model)  # raises
        if not self.plan().rules:
            raise ValueError(
                "no rule says what to split, and use_default_specs is false: give partition_config.layer_specs, "
                "preset_model or vocab_parallel_lm_head"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of a layer."""
        return self.autotp_size if self.blocks is None else self.blocks

    def plan(self) -> Plan:
        """Return the rules.

        Example:
            >>> len(TensorConfig(autotp_size=2, vocab_parallel_lm_head=True).plan().rules)
            6
        """
        said, by_default = self.partition_config.layer_specs, self.partition_config.use_default_specs
        vocabulary = VOCABULARY if self.vocab_parallel_lm_head else ()
        named = self.preset_model or (_DEFAULT if by_default and not said else None)
        rules = (*said, *(() if named is None else preset(named).rules), *vocabulary)
        defaults = PRESETS[_DEFAULT] if by_default and named is None else ()
        return Plan(rules=rules, counts=self.counts, defaults=defaults)
