"""Checks of the arguments that all fused optimizers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNOFFERED = ("amsgrad", "maximize", "capturable", "differentiable", "centered")
_NEEDLESS = ("fused", "foreach")


def check_storage(
    kind: str, moments: str, offered: Sequence[str], *, rounding: Any, kernels: Any, others: Mapping[str, Any]
) -> None:
    """Check what is not a hyperparameter.

    Args:
        kind: Name of the optimizer's class, for messages.
        moments: How moments are stored.
        offered: What ``moments`` may be.
        rounding: An object that makes keys, or None.
        kernels: A backend, or None.
        others: Arguments that no class has.

    Raises:
        TypeError: If an argument is not offered, or a name stands for an object.
        ValueError: If ``moments`` is not one of ``offered``.
    """
    for name, value in others.items():
        if name in _NEEDLESS:
            cure = "every step is one fused kernel for each parameter; leave it out"
        elif name in _UNOFFERED:
            cure = "it is not offered; use torch.optim's class"
        else:
            cure = f"the signature of {kind} lists what there is, besides moments, rounding, zero_grad and kernels"
        raise TypeError(f"{kind} takes no argument {name!r}; got {value!r}; {cure}")
    if moments not in offered:
        raise ValueError(f"moments must be one of {', '.join(offered)}; got {moments!r}")
    if isinstance(rounding, str):
        raise TypeError(f"rounding must be an object such as StochasticRounding(seed=0); got the text {rounding!r}")
    if isinstance(kernels, str):
        raise TypeError(
            f"kernels must be a backend such as ReferenceBackend(); got the text {kernels!r}; use_backend({kernels!r}) "
            "chooses one by name"
        )
