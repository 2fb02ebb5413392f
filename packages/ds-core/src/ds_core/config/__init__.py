"""Configuration: DeepSpeed's JSON in, one frozen value out."""

from .batch import Batch
from .parse import parse
from .schema import schema
from .sections import ActivationCheckpointing, Choice, Config, Fp16
from .show import announce, effective
from .source import Source, read
from .strip import with_effect
from .tensor import num_tensor_ranks

__all__ = [
    "ActivationCheckpointing",
    "Batch",
    "Choice",
    "Config",
    "Fp16",
    "Source",
    "announce",
    "effective",
    "num_tensor_ranks",
    "parse",
    "read",
    "schema",
    "with_effect",
]
