"""Access to the values of several partitioned stages of one rank, by name of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .access_protocols import Access, Interval, Param, Parking
    from .protocols import Sharded


class ChunkAccess:
    """Plays the role ``Access`` for the stages of one rank.

    Calls that all ranks make are made here by all data-parallel ranks of the stage that has the parameter.

    Args:
        chunks: The stages.
        owners: Rank of the pipeline that has each parameter and buffer.
        rank: This one.
    """

    def __init__(self, chunks: Sequence[Sharded], owners: Mapping[str, int], rank: int) -> None:
        self._chunks = chunks
        self._owners = owners
        self._rank = rank

    def full_param(self, param: Param) -> Tensor:
        """Return a copy of the whole parameter."""
        return self._of(param).full_param(param)

    def set_full_param(self, param: Param, value: Tensor) -> None:
        """Replace the whole parameter by ``value``, which is the same on all ranks of its stage."""
        self._of(param).set_full_param(param, value)

    def local_param(self, param: Param) -> Interval:
        """Return this rank's interval, to be read."""
        return self._of(param).local_param(param)

    def set_local_param(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval."""
        self._of(param).set_local_param(param, value)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter of this rank's stages, whole, with its name."""
        return chain.from_iterable(chunk.access.stream() for chunk in self._chunks)

    @contextmanager
    def gathered(
        self, what: nn.Module | Param | Iterable[Param], *, writeback_from: int | None = None
    ) -> Iterator[None]:
        """Make parameters of this rank's stages whole in the model within the block."""
        wanted: list[nn.Module | Param] = [what] if isinstance(what, (str, nn.Module, nn.Parameter)) else [*what]
        with ExitStack() as stack:
            for one in wanted:
                accesses = self._below(one) if isinstance(one, nn.Module) else [self._of(one)]
                for access in accesses:
                    stack.enter_context(access.gathered(one, writeback_from=writeback_from))
            yield

    def full_grad(self, param: Param, *, reduction: str = "mean") -> Tensor:
        """Return a copy of the whole gradient in float32: the ``"mean"`` or the ``"sum"``."""
        return self._of(param).full_grad(param, reduction=reduction)

    def set_full_grad(self, param: Param, value: Tensor, *, reduction: str = "mean") -> None:
        """Replace the whole gradient by ``value``."""
        self._of(param).set_full_grad(param, value, reduction=reduction)

    def local_grad(self, param: Param) -> Interval:
        """Return this rank's interval of the sum, to be read."""
        return self._of(param).local_grad(param)

    def set_local_grad(self, param: Param, value: Tensor) -> None:
        """Replace this rank's interval of the sum."""
        self._of(param).set_local_grad(param, value)

    def full_state(self, param: Param, key: str) -> Tensor:
        """Return a copy of the whole tensor in float32."""
        return self._of(param).full_state(param, key)

    def set_full_state(self, param: Param, key: str, value: Tensor) -> None:
        """Replace the whole tensor by ``value``."""
        self._of(param).set_full_state(param, key, value)

    def local_state(self, param: Param, key: str) -> Interval:
        """Return this rank's interval, to be read."""
        return self._of(param).local_state(param, key)

    def _of(self, param: Param) -> Access:
        """Return the access of the stage that has ``param``."""
        for chunk in self._chunks:
            for name, own in chunk.module.named_parameters(remove_duplicate=False):
                if param is own or param == name:
                    return chunk.access
        if isinstance(param, str) and param in self._owners:
            raise ValueError(
                f"parameter {param!r} is on rank {self._owners[param]} of the pipeline, this is rank {self._rank}: ask "
                "there"
            )
        what = repr(param) if isinstance(param, str) else f"of shape {list(param.shape)}"
        raise ValueError(f"the model has no parameter {what}")

    def _below(self, part: nn.Module) -> list[Access]:
        below = set(part.modules())
        found = [chunk.access for chunk in self._chunks if not below.isdisjoint(chunk.module.modules())]
        if not found:
            raise ValueError(f"no stage of this rank has the module {type(part).__name__}")
        return found


class ChunkParking:
    """Plays the role ``Parking`` for the stages of one rank.

    Args:
        parkings: Of the stages.
    """

    def __init__(self, parkings: Sequence[Parking]) -> None:
        self._parkings = parkings

    @property
    def kinds(self) -> Sequence[str]:
        """What can be moved, of any stage."""
        return list(dict.fromkeys(kind for parking in self._parkings for kind in parking.kinds))

    def offload_states(self, include: Iterable[str], *, pin_memory: bool = True) -> dict[str, int]:
        """Move ``include`` of :attr:`kinds`; return the bytes that each has freed."""
        wanted = list(include)
        freed = dict.fromkeys(wanted, 0)
        for parking in self._parkings:
            for kind, nbytes in parking.offload_states(
                [kind for kind in wanted if kind in parking.kinds], pin_memory=pin_memory
            ).items():
                freed[kind] += nbytes
        return freed

    def reload_states(self) -> int:
        """Move back all that is away; return the bytes."""
        return sum(parking.reload_states() for parking in self._parkings)
