"""The process group itself: ``torch.distributed``'s calls, turned into moves through shared memory.

[Note: At once]
A collective is over when its call returns, whether ``async_op`` was asked for or not: the caller's thread moves the
bytes. On CPU there is no other engine that could: a thread of our own would take a core from the computation, or from
another rank, for the same copies, and add two changes of threads to each call. So every rank must make its calls in the
same order, over all groups together: calls of two groups in opposite orders wait for each other.

[Note: Rank order]
Sums, means and products are taken in the order of ranks, 16-bit floats in float32 and rounded once, by whichever rank
computes an element. So the bits depend on the data and the number of ranks alone, and are the same on all ranks. The
backends that come with torch add in the order in which a ring passes by.

Messages between two ranks (``send``, ``recv``) go over gloo.
"""

# torch's stubs hold overloads with single tensors, which only its own groups have
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .calls import Verb, addresses, checked, moving, reducing, sizes, split

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from .._shm import Channel
    from .calls import Call
    from .joining import Joined

# what torch passes where a caller says nothing
_ALL_REDUCE = dist.AllreduceOptions()
_REDUCE = dist.ReduceOptions()
_REDUCE_SCATTER = dist.ReduceScatterOptions()
_BROADCAST = dist.BroadcastOptions()
_GATHER = dist.GatherOptions()
_SCATTER = dist.ScatterOptions()


class Done(dist.Work):
    """A collective that is over; see [Note: At once]."""

    def __init__(self, result: Sequence[Tensor]) -> None:
        super().__init__()
        self._result = list(result)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return at once."""
        del timeout
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True: what fails raises where it is called."""
        return True

    def result(self) -> list[Tensor]:
        """Return the tensors that were written."""
        return self._result

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """Return a future that holds the result already."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._result)
        return future


class _Messages(dist.ProcessGroup):
    """What is no collective: messages between two ranks, over gloo, and the group's end."""

    def __init__(
        self, store: Store, rank: int, size: int, *, channel: Channel, gloo: dist.ProcessGroupGloo, joined: Joined
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # with a store, it is not for subclasses
        self._store = store
        self._name = self._description = ""
        self._rank = rank
        self._size = size
        self._channel = channel
        self._gloo: Any = gloo  # torch's stubs lack its messages; None when the group is destroyed
        self._joined = joined
        self.options = gloo.options
        """Holds the timeout, where callers of ``_get_backend`` look for it."""

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """Return the name under which the group was asked for."""
        return "ds_shm"

    # torch keeps a group's name in its backends, of which this one has none

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Set the name under which torch finds the group."""
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        """Return the name under which torch finds the group."""
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """Set what the caller says of the group."""
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        """Return what the caller says of the group."""
        return self._description

    def get_group_store(self) -> Store:
        """Return the store of this group alone."""
        return self._store

    def _get_backend(self, device: torch.device) -> _Messages:
        if device.type != "cpu":
            raise RuntimeError(
                f"No backend type associated with device type {device.type}: ds_shm is for tensors on CPU"
            )
        return self

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> dist.Work:
        """Send to one rank."""
        checked(tensors)
        work: dist.Work = self._messenger().send(tensors, dst, tag)
        return work

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> dist.Work:
        """Receive from one rank."""
        checked(tensors)
        work: dist.Work = self._messenger().recv(tensors, src, tag)
        return work

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        """Receive from whichever rank sends first."""
        checked(tensors)
        work: dist.Work = self._messenger().recv_anysource(tensors, tag)
        return work

    def _messenger(self) -> Any:
        if self._gloo is None:
            raise dist.DistBackendError("this process group has been destroyed: make another to send messages")
        return self._gloo

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long a collective waits for other ranks, from the next call on."""
        self._channel.set_timeout(timeout.total_seconds())
        self.options._timeout = timeout

    def shutdown(self) -> None:
        """Give memory, descriptors and connections back; the others learn that this rank has left."""
        self._channel.close()
        self._joined.close()
        self._gloo = None

    def abort(self) -> None:
        """Do as :meth:`shutdown`."""
        self.shutdown()


class ShmProcessGroup(_Messages):
    """Ranks of one host; see [Note: At once] and [Note: Rank order].

    Tensors are dense, contiguous and on CPU. Every collective waits for all ranks of the group, and raises on all of
    them if they do not make the same call. Memory: 2 MiB of shared memory per rank and group, whatever the size of
    tensors.

    Args:
        store: Of this group alone.
        rank: Of this process.
        size: Number of ranks.
        channel: The shared memory.
        gloo: A group of the same ranks, for messages between two of them.
        joined: What ``channel`` watches the others by; closed with it.

    Raises:
        torch.distributed.DistBackendError: From any collective: a rank has ended, is late, has given up, or makes
            another call. The text names it. The group is of no use from then on.
    """

    # Reductions #

    def allreduce(self, tensors: list[Tensor], opts: dist.AllreduceOptions = _ALL_REDUCE) -> dist.Work:
        """Reduce each tensor over all ranks, in place."""
        checked(tensors)
        for tensor in tensors:
            self._reduce(reducing(Verb.ALL_REDUCE, tensor, opts.reduceOp), tensor, wanted=True)
        return Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = _ALL_REDUCE) -> dist.Work:
        """Reduce each tensor over all ranks, in place."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: dist.ReduceOptions = _REDUCE) -> dist.Work:
        """Reduce over all ranks, in place on the root; others keep what they have."""
        checked(tensors)
        for tensor in tensors:
            call = reducing(Verb.REDUCE, tensor, opts.reduceOp, opts.rootRank)
            self._reduce(call, tensor, wanted=self._rank == opts.rootRank)
        return Done(tensors)

    def reduce_scatter(
        self,
        outputs: list[Tensor],
        inputs: list[list[Tensor]],
        opts: dist.ReduceScatterOptions = _REDUCE_SCATTER,
    ) -> dist.Work:
        """Reduce everybody's ``inputs[0][rank]`` into ``outputs[0]``."""
        (output,), (pieces,) = outputs, inputs
        checked([output, *pieces])
        if [piece.numel() for piece in pieces] != [output.numel()] * self._size:
            raise ValueError(
                f"reduce_scatter takes {self._size} tensors of the output's {output.numel()} elements; got "
                f"{[piece.numel() for piece in pieces]}"
            )
        self._reduce_pieces(output, addresses(pieces), opts)
        return Done(outputs)

    def reduce_scatter_single(
        self, output: Tensor, data: Tensor, opts: dist.ReduceScatterOptions = _REDUCE_SCATTER
    ) -> dist.Work:
        """Reduce everybody's slice ``rank`` of ``data`` into ``output``."""
        checked([output, data])
        self._check_whole(data, output)
        starts = range(data.data_ptr(), data.data_ptr() + data.nbytes + 1, output.nbytes or 1)
        self._reduce_pieces(output, starts[: self._size] if output.numel() else [0] * self._size, opts)
        return Done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], data: list[Tensor], opts: dist.ReduceScatterOptions = _REDUCE_SCATTER
    ) -> dist.Work:
        """Do :meth:`reduce_scatter_single` with each pair."""
        for output, each in zip(outputs, data, strict=True):
            self.reduce_scatter_single(output, each, opts)
        return Done(outputs)

    # Copies #

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions = _BROADCAST) -> dist.Work:
        """Overwrite each tensor with the root's."""
        checked(tensors)
        root = opts.rootRank
        for tensor in tensors:
            own = self._rank == root
            outs, nbytes = [0] * self._size, [0] * self._size
            outs[root], nbytes[root] = tensor.data_ptr(), tensor.nbytes
            call = moving(Verb.BROADCAST, tensor, root)
            with _as_torch():
                self._channel.share(call, tensor.data_ptr(), tensor.nbytes if own else 0, outs, nbytes)
        return Done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Fill ``outputs[0]`` with every rank's ``inputs[0]``."""
        del opts  # nothing but a timeout
        (pieces,), (data,) = outputs, inputs
        checked([data, *pieces])
        self._gather(Verb.ALL_GATHER, data, pieces)
        return Done(pieces)

    def all_gather_single(self, output: Tensor, data: Tensor, opts: Any = None) -> dist.Work:
        """Fill ``output`` with every rank's ``data``, which may be its own slice of ``output``."""
        del opts
        checked([output, data])
        self._check_whole(output, data)
        outs = [output.data_ptr() + rank * data.nbytes for rank in range(self._size)]
        with _as_torch():
            self._channel.share(
                moving(Verb.ALL_GATHER, data), data.data_ptr(), data.nbytes, outs, [data.nbytes] * self._size
            )
        return Done([output])

    def all_gather_single_coalesced(self, outputs: list[Tensor], data: list[Tensor], opts: Any = None) -> dist.Work:
        """Do :meth:`all_gather_single` with each pair."""
        for output, each in zip(outputs, data, strict=True):
            self.all_gather_single(output, each, opts)
        return Done(outputs)

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: dist.GatherOptions = _GATHER
    ) -> dist.Work:
        """Fill ``outputs[0]`` on the root with every rank's ``inputs[0]``."""
        (data,) = inputs
        pieces = outputs[0] if self._rank == opts.rootRank else []
        checked([data, *pieces])
        self._gather(Verb.GATHER, data, pieces, opts.rootRank)
        return Done(pieces)

    def scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: dist.ScatterOptions = _SCATTER
    ) -> dist.Work:
        """Fill ``outputs[0]`` with the root's ``inputs[0][rank]``."""
        (output,), root = outputs, opts.rootRank
        pieces = inputs[0] if self._rank == root else []
        checked([output, *pieces])
        outs, nbytes = [0] * self._size, [0] * self._size
        outs[root], nbytes[root] = output.data_ptr(), output.nbytes
        with _as_torch():
            self._channel.exchange(
                moving(Verb.SCATTER, output, root),
                addresses(pieces) or [0] * self._size,
                sizes(pieces) or [0] * self._size,
                outs,
                nbytes,
            )
        return Done(outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Give ``inputs[r]`` to each rank r, and take ``outputs[r]`` from it."""
        del opts
        checked([*outputs, *inputs])
        self._exchange(inputs[0], addresses(inputs), sizes(inputs), addresses(outputs), sizes(outputs))
        return Done(outputs)

    def all_to_all_single(
        self, output: Tensor, data: Tensor, out_rows: Sequence[int], in_rows: Sequence[int], opts: Any = None
    ) -> dist.Work:
        """Give each rank its rows of ``data``, and take its rows of ``output``."""
        del opts
        checked([output, data])
        self._exchange(
            data, *split(data, in_rows, self._size, "the input"), *split(output, out_rows, self._size, "the output")
        )
        return Done([output])

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait for all ranks."""
        del opts
        nothing = [0] * self._size
        with _as_torch():
            self._channel.share((Verb.BARRIER, -1, -1, -1), 0, 0, nothing, nothing)
        return Done([])

    # before torch 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # What several share #

    def _reduce(self, call: Call, tensor: Tensor, *, wanted: bool) -> None:
        at = tensor.data_ptr()
        with _as_torch():
            self._channel.all_reduce(call, at, at if wanted else 0, tensor.numel(), tensor.element_size())

    def _reduce_pieces(self, output: Tensor, starts: Sequence[int], opts: dist.ReduceScatterOptions) -> None:
        call = reducing(Verb.REDUCE_SCATTER, output, opts.reduceOp)
        with _as_torch():
            self._channel.reduce_scatter(call, starts, output.data_ptr(), output.numel(), output.element_size())

    def _gather(self, verb: Verb, data: Tensor, pieces: Sequence[Tensor], root: int = -1) -> None:
        outs, nbytes = addresses(pieces) or [0] * self._size, sizes(pieces)
        with _as_torch():
            # a rank that takes nothing does not mind how much it is given
            expected = nbytes or [data.nbytes] * self._size
            self._channel.share(moving(verb, data, root), data.data_ptr(), data.nbytes, outs, expected)

    def _exchange(
        self, like: Tensor, ins: list[int], in_nbytes: list[int], outs: list[int], out_nbytes: list[int]
    ) -> None:
        with _as_torch():
            self._channel.exchange(moving(Verb.ALL_TO_ALL, like), ins, in_nbytes, outs, out_nbytes)

    def _check_whole(self, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != self._size * part.numel() or whole.dtype != part.dtype:
            raise ValueError(
                f"the whole must have {self._size} times as many elements as a part, and its data type; got "
                f"{whole.numel()} of {whole.dtype} and {part.numel()} of {part.dtype}"
            )


@contextmanager
def _as_torch() -> Iterator[None]:
    """Raise what the native module found as torch's own error."""
    try:
        yield
    except RuntimeError as error:
        raise dist.DistBackendError(str(error)) from None
