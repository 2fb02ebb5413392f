"""How kernels cut a matrix: rows, or tiles of columns and slabs of rows where they sum over rows."""

from __future__ import annotations

from torch import Tensor

from .kernel import PACKET

TILE_THREADS = 256
"""Of a block: 32 packets across, 8 rows down."""

_TILE_COLUMNS = 32 * PACKET
_TILE_ROWS = 8
_LONG_ROW = 1024  # from here on, a row keeps 256 threads busy
_WANTED_BLOCKS = 2048  # several for each multiprocessor of any GPU


def row_threads(columns: int) -> int:
    """Return how many threads take one row."""
    return 256 if columns > _LONG_ROW else 64


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    """Return the number of rows of ``x``, and the length of its last dimension."""
    columns = x.shape[-1] if x.dim() else 1
    return (x.numel() // columns if columns else 0), columns


def tiles(rows: int, columns: int) -> tuple[tuple[int, int], int]:
    """Return the grid, tiles of columns by slabs of rows, and the rows of a slab.

    Example:
        >>> tiles(rows=1000, columns=256)
        ((2, 125), 8)
    """
    across = -(-columns // _TILE_COLUMNS)
    slabs = max(1, min(-(-rows // _TILE_ROWS), _WANTED_BLOCKS // max(1, across)))
    return (across, slabs), -(-rows // slabs)
