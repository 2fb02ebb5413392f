"""Types of the optional native module; its source is in ``csrc/shm/module.cpp``."""

from collections.abc import Sequence
from typing import TypeAlias

_Layout: TypeAlias = tuple[int, int, int]  # ranks, slots of each, bytes of a slot
_Call: TypeAlias = tuple[int, int, int, int]  # verb, format, reduction, root; see shm/calls.py

def segment_bytes(layout: _Layout, /) -> int: ...
def fold(best: bool, format: int, reduction: int, out: int, arrays: Sequence[int], numel: int, /) -> None: ...

class Channel:
    def __init__(
        self,
        fd: int,
        rank: int,
        layout: _Layout,
        watches: Sequence[int],
        names: Sequence[str],
        spins: int,
        timeout: float,
        /,
    ) -> None: ...
    def share(self, call: _Call, data: int, nbytes: int, outs: Sequence[int], out_nbytes: Sequence[int], /) -> None: ...
    def exchange(
        self,
        call: _Call,
        ins: Sequence[int],
        in_nbytes: Sequence[int],
        outs: Sequence[int],
        out_nbytes: Sequence[int],
        /,
    ) -> None: ...
    def all_reduce(self, call: _Call, data: int, out: int, numel: int, item: int, /) -> None: ...
    def reduce_scatter(self, call: _Call, ins: Sequence[int], out: int, numel: int, item: int, /) -> None: ...
    def set_timeout(self, seconds: float, /) -> None: ...
    def close(self) -> None: ...
