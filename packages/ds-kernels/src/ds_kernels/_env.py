"""The environment variables that are read: nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "DS_KERNELS_CACHE"
"""Names the folder for compiled kernels; empty: none are kept."""


def cache_folder() -> Path | None:
    """Return the folder for compiled kernels: ``$DS_KERNELS_CACHE``, else ``ds-kernels`` in the XDG cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds-kernels"
