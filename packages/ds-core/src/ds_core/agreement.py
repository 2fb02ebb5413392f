"""One configuration on all ranks: others would wait for each other, or compute something that nobody has asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ._control import Control, everybody
from .config import with_effect

if TYPE_CHECKING:
    from .protocols import Json

_OWN = "kernels"  # a rank may have its own: what they compute is the same


def check_agreed(source: Mapping[str, Json], control: Control) -> None:
    """Refuse configurations that differ, on all ranks; keys that have no effect may, and the section ``kernels``.

    Communication: a digest of 64 bytes from each rank; the values, where they differ.

    Raises:
        ValueError: They do; the ranks, a key and its values are named.

    Example:
        >>> from ._control import make_control
        >>> check_agreed({"train_batch_size": 8}, make_control(None))
    """
    own = {path: value for path, value in with_effect(source).items() if path.split(".")[0] != _OWN}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    digests = everybody(control, digest)
    others = [rank for rank, each in enumerate(digests) if each != digests[0]]
    if not others:
        return
    rows = everybody(control, own)
    first, other = ({path: json.dumps(value) for path, value in rows[rank].items()} for rank in (0, others[0]))
    path = min(path for path, _ in first.items() ^ other.items())
    raise ValueError(
        f"ranks {others} were given another configuration than rank 0: {path} is {other.get(path, 'missing')} on rank "
        f"{others[0]}, and {first.get(path, 'missing')} on rank 0. Pass the same on every rank"
    )
