"""Large-model training from a DeepSpeed configuration: the engine, and the parts it finds through entry points.

Names are loaded when first used, so that ``import ds_core`` and the ``ds`` command cost no ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._control import RankError
    from .activations import Checkpointer
    from .build import Training, initialize
    from .config import ActivationCheckpointing
    from .engine import Engine
    from .policy import StepOutcome

__version__ = "0.1.0"
__all__ = ["ActivationCheckpointing", "Checkpointer", "Engine", "RankError", "StepOutcome", "Training", "initialize"]

_HOMES = {
    "ActivationCheckpointing": ".config",
    "Checkpointer": ".activations",
    "Engine": ".engine",
    "RankError": "._control",
    "StepOutcome": ".policy",
    "Training": ".build",
    "initialize": ".build",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return vars(import_module(_HOMES[name], __name__))[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
