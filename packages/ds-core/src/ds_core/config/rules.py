"""Rules between sections, all in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

from .sections import ActivationCheckpointing, Bf16, Config, Fp16

if TYPE_CHECKING:
    from ..protocols import Json

_Section: TypeAlias = Fp16 | Bf16 | ActivationCheckpointing


def check(raw: Mapping[str, Json], *, client_optimizer: bool) -> None:
    """Refuse combinations that contradict each other.

    Args:
        raw: The configuration, without ``"auto"`` and without keys that have no effect.
        client_optimizer: Whether the caller passes an optimizer.

    Raises:
        ValueError: If one does; all contradictions are named.
    """
    problems = []
    if _section(raw, "fp16").get("enabled") is True and _section(raw, "bf16").get("enabled") is True:
        problems.append("fp16.enabled and bf16.enabled are both True; a model computes in one of the two")
    if raw.get("scheduler") is not None and raw.get("optimizer") is None and not client_optimizer:
        problems.append(
            f"scheduler = {raw['scheduler']!r} has no optimizer to work on; add the section 'optimizer', or "
            "pass an optimizer object"
        )
    params = _section(_section(raw, "optimizer"), "params")
    if "max_grad_norm" in params:
        problems.append(
            f"optimizer.params.max_grad_norm = {params['max_grad_norm']!r} is not read by optimizers; "
            f"set gradient_clipping = {params['max_grad_norm']!r} instead"
        )
    if problems:
        raise ValueError("\n".join(problems))


def idle(config: Config) -> dict[str, str]:
    """Return the keys that have no effect because of another one, with the reason.

    DeepSpeed's files carry the settings of the loss scale along where float16 is off, so that is no error; at
    their defaults it is not worth a word either.
    """
    found: dict[str, str] = {}
    if not config.fp16.enabled:
        found |= {f"fp16.{key}": "fp16.enabled is false" for key in _changed(config.fp16, Fp16())}
    if not config.bf16.enabled:
        found |= {f"bf16.{key}": "bf16.enabled is false" for key in _changed(config.bf16, Bf16())}
    section = "activation_checkpointing"
    changed = _changed(config.activation_checkpointing, ActivationCheckpointing())
    if not config.activation_checkpointing.blocks:
        found |= {
            f"{section}.{key}": f"{section}.blocks is false, and a model has its own Checkpointer" for key in changed
        }
    elif "partition_activations" in changed and "tensor_parallel" not in config.plugins:
        found[f"{section}.partition_activations"] = (
            "layers are whole (tensor_parallel), so no two ranks have one activation"
        )
    return found


def _changed(section: _Section, default: _Section) -> list[str]:
    values, defaults = asdict(section), asdict(default)
    return [key for key in values if values[key] != defaults[key]]


def _section(raw: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    value = raw.get(name)
    return value if isinstance(value, Mapping) else {}
