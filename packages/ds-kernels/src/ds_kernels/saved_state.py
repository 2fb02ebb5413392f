"""State of a parameter as state dicts hold it: names, codecs and sizes.

[Note: Saved states]
Where state is float32 without ``master_low``, it has torch's names, and loads into torch's class. Else each moment
carries its data type in its name (``exp_avg_int8``), and under torch's name stands NaN, a plain number: torch's class
would cast codes to floats and train on; so it fails at its first step. States that were saved before, with codes under
torch's names, load as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.checks import GROUP
from .group_step import LOW
from .parameters import Place, in_memory_order, is_one_array, same_order

_TYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
_CODED = MappingProxyType({dtype: str(dtype).removeprefix("torch.") for dtype in _TYPES})
_REFUSED = "max_exp_avg_sq"  # amsgrad's; the group says so, too, and is refused by a better message


def coded_names(state: Mapping[str, Any], moments: Iterable[str]) -> dict[str, Any]:
    """Return ``state`` under the names that say how it is coded; see [Note: Saved states]."""
    held = [name for name in moments if name in state]
    if LOW not in state and all(state[name].dtype == torch.float32 for name in held):
        return dict(state)
    coded = dict(state)
    for name in held:
        coded[name] = torch.nan
        coded[f"{name}_{_CODED[state[name].dtype]}"] = state[name]
    return coded


def torchs_state(state: Mapping[str, Any], moments: Iterable[str]) -> dict[str, Any]:
    """Return ``state`` as torch's class holds it, in new memory."""
    saved = SavedState(state)
    decoded = {name: moment.decoded().clone() for name in moments if (moment := saved.moment(name)) is not None}
    return decoded if "step" not in state else {"step": state["step"].clone(), **decoded}


class Moment(NamedTuple):
    """A moment as it was saved."""

    stored: Tensor
    scale: Tensor | None

    def fits(self, param: Tensor) -> bool:
        """Return whether groups of 8-bit codes are those of ``param``; all else fits."""
        return self.scale is None or same_order(self.stored, param)

    def copied(self, name: str, param: Tensor) -> dict[str, Tensor]:
        """Return the moment beside ``param``, in new memory."""
        stored = torch.empty_like(param, dtype=self.stored.dtype).copy_(self.stored.view(param.shape))
        return {name: stored} | (
            {} if self.scale is None else {f"{name}_scale": self.scale.to(param.device, copy=True)}
        )

    def decoded(self) -> Tensor:
        """Return the float32 values, in the shape that was saved."""
        from .backends.plain import state_codecs

        if self.scale is None or self.stored.is_contiguous() or not is_one_array(self.stored):
            return state_codecs.decode(self.stored, self.scale)
        values = state_codecs.decode(in_memory_order(self.stored), self.scale)
        return values.as_strided(self.stored.shape, self.stored.stride())


class SavedState:
    """Reads the saved state of one parameter, whatever names it has.

    Args:
        saved: As a state dict holds it.
    """

    def __init__(self, saved: Mapping[str, Any]) -> None:
        self._saved = saved

    def step(self) -> Any:
        """Return how many steps were done; at least one where that was not counted."""
        return self._saved.get("step", 1.0)

    def low(self) -> Tensor | None:
        """Return the lower half of a bfloat16 parameter's master."""
        return self._saved.get(LOW)

    def moment(self, name: str) -> Moment | None:
        """Return a moment; None where it was not there yet."""
        for key in (name, *(f"{name}_{kind}" for kind in _CODED.values())):
            if isinstance(self._saved.get(key), Tensor):
                return Moment(self._saved[key], self._saved.get(f"{name}_scale"))
        return None


def check_keys(kind: str, place: Place, saved: Mapping[str, Any], moments: Iterable[str], *, counted: bool) -> None:
    """Check that ``saved`` is the state of a parameter of this size, from this class or torch's.

    Args:
        kind: Name of the class.
        place: The parameter.
        saved: Its state; empty where it had none.
        moments: Of the class.
        counted: Whether the class needs ``step``.

    Raises:
        ValueError: If it is not.
    """
    if not saved:
        return
    names = tuple(moments)
    stem = {f"{name}{end}": name for name in names for end in ("", "_scale", *(f"_{k}" for k in _CODED.values()))}
    foreign = sorted(set(saved) - {*stem, "step", LOW, _REFUSED})
    held = {stem[key] for key in saved if key in stem}
    missing = [*({"step"} - set(saved) if counted else ()), *(set(names) - held if len(names) > 1 else ())]
    if foreign or missing:
        has, needs = ", ".join(sorted(saved)), ", ".join([*(["step"] if counted else []), *names])
        raise ValueError(
            f"the state of {place} must be that of {kind}, with {needs}; got {has}; load it into the class that saved "
            "it"
        )
    for key, value in saved.items():
        if key == "step" or not isinstance(value, Tensor):
            continue
        wanted = place.param.numel()
        if key.endswith("_scale"):
            wanted = (wanted + GROUP - 1) // GROUP
        if value.numel() != wanted:
            raise ValueError(
                f"{key} of {place} must have {wanted} elements; got {value.numel()}, shape {tuple(value.shape)}; the "
                "state is of another model, or its parameters are in another order"
            )
