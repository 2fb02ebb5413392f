"""Large-model training from a DeepSpeed configuration: the engine, and the parts it finds through entry points."""

from .build import Training, initialize
from .engine import Engine, StepOutcome

__version__ = "0.1.0"
__all__ = ["Engine", "StepOutcome", "Training", "initialize"]
