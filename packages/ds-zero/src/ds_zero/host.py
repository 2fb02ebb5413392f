"""Communication of ranks on one host: each reads the others' memory where it lies.

[Note: Reading in place]
A call says where its data lie (READY, one small record per peer), reads the peers' data once all of them have said so,
and tells them that it has (DONE). Nothing is copied on the way: an all-gather is one copy from the owner's shard to
its place, an ordered reduce-scatter one pass that reads every rank's slice and writes the sum. Sockets, in contrast,
copy each byte into the kernel and out again, on threads that compete with the computation for cores.

While one call waits, whatever others have become complete is read as well, so ranks may wait for their calls in
different orders. Data that lie in no window (see :meth:`HostCollectives.allocate`) are copied to one first.

Memory: none but that of staged data. The pages a rank reads count in its resident set as well as in their owner's.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .texts import shown
from .windows import Memory, Windows, map_window

if TYPE_CHECKING:
    from ds_core.kernel_protocols import ShardKernels
    from ds_core.protocols import Collectives

_logger = logging.getLogger(__package__)
_FORMAT = struct.Struct("<qqqqqq")
_FD = struct.Struct("i")
ROWS = 1 << 20
"""Key of ``gather_rows``, apart from those of buffers."""
_PART = ROWS + 1  # key of a broadcast among some of a group's ranks

_NOTICE = 60.0  # seconds after which a wait is told of
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS)  # a socket is full, or a user's descriptors under way are too many
_PAUSE = 0.001  # seconds
_VERBS = 3  # each buffer's key stands for so many calls: gather, reduce, exchange


class Kind(IntEnum):
    """What a record says."""

    READY = 0  # the sender's data of a call lie at a place, and stay until DONE
    DONE = 1  # the sender has read the receiver's
    GONE = 2  # the sender's window is no more


class Record(NamedTuple):
    """A message between two ranks."""

    kind: int
    call: int  # which buffer, and what is done with it
    turn: int  # how many such calls came before
    window: int = -1
    offset: int = 0  # bytes
    nbytes: int = 0


class PeerLostError(RuntimeError):
    """Another rank's process has ended."""


class Call:
    """A collective under way; plays the role ``Handle``."""

    __slots__ = ("_finish", "over", "pieces", "ready", "staged", "take", "unread", "unready")

    def __init__(
        self,
        finish: Callable[[Call], None],
        ready: Record,
        pieces: Sequence[Tensor],
        take: Callable[[Sequence[Tensor]], None],
        peers: Sequence[int],
    ) -> None:
        self._finish = finish
        self.ready = ready
        self.pieces = list(pieces)  # by rank: what is expected, then what was found in the peers' memory
        self.take = take  # what to do with all of them
        self.unready = set(peers)  # have not said where their data lie
        self.unread = set(peers)  # have not read ours
        self.staged: list[Tensor] = []
        self.over = False

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""
        self._finish(self)


class HostCollectives:
    """Plays the role ``Collectives``; see [Note: Reading in place].

    Args:
        group: A process group; communicates in :meth:`broadcast` only, if all its ranks are members.
        members: The ranks of it that communicate here.
        sockets: Connections to all others of them, by index; see [Note: Links].
        kernels: Ordered sums.
        timeout: Seconds after which a wait is given up.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        members: Sequence[int],
        sockets: dict[int, socket.socket],
        kernels: ShardKernels,
        timeout: float,
    ) -> None:
        self.rank = members.index(dist.get_rank(group))
        self.size = len(members)
        self._group = group
        self._names = [dist.get_global_rank(group, member) for member in members]  # as users know them
        self._sockets = sockets
        self._kernels = kernels
        self._timeout = timeout
        self._peers = sorted(sockets)
        self._poll = select.poll()
        self._rank_of = {peer.fileno(): rank for rank, peer in sockets.items()}
        for fd, rank in self._rank_of.items():
            sockets[rank].settimeout(0.0)  # nobody waits but in poll()
            self._poll.register(fd, select.POLLIN)
        self._unsent: dict[int, deque[Record]] = {peer: deque() for peer in self._peers}  # did not fit into a socket
        self._windows = Windows(self._peers)
        self._mapped: dict[tuple[int, int], Memory] = {}  # by rank and its window
        self._ended: set[int] = set()
        self._turns: Counter[int] = Counter()
        self._calls: dict[tuple[int, int], Call] = {}
        self._early: dict[tuple[int, int], dict[int, Record]] = {}  # of calls that this rank has yet to make
        self._spare: list[Tensor] = []  # windows for data that lie in none

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D memory of ``like``'s data type that is read in place; zeros."""
        return self._windows.allocate(numel, like)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Call:
        """Fill ``out`` (1D) with every rank's ``shard``, which may be its own slice of ``out``."""
        slices = out.view(self.size, -1).unbind()
        if shard.data_ptr() != slices[self.rank].data_ptr():
            slices[self.rank].copy_(shard)
        return self._start(_VERBS * key, [shard] * self.size, slices, partial(self._place, slices))

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Call:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``; see [Note: Ordered reduce-scatter]."""
        slices = full.view(self.size, -1).unbind()
        expected = [slices[self.rank]] * self.size
        return self._start(_VERBS * key + 1, slices, expected, partial(self._kernels.tree_sum, out))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Call:
        """Send ``outgoing[r]`` to rank r and fill ``incoming[r]`` from it; 1D, contiguous, possibly empty."""
        incoming[self.rank].copy_(outgoing[self.rank])
        return self._start(_VERBS * key + 2, outgoing, incoming, partial(self._place, incoming))

    def gather_rows(self, row: Tensor) -> Tensor:
        """Return ``[size, n]``: every rank's ``row``."""
        rows = row.new_empty(self.size, row.numel())
        self.all_gather(rows.view(-1), row, key=ROWS).wait()
        return rows

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with rank 0's."""
        if self.size == dist.get_world_size(self._group):
            dist.broadcast(tensor, group=self._group, group_src=0)
        else:
            send_from_first(self, tensor)

    # Calls #

    def _start(
        self, kind: int, outgoing: Sequence[Tensor], pieces: Sequence[Tensor], take: Callable[[Sequence[Tensor]], None]
    ) -> Call:
        name = kind, self._turns[kind]
        self._turns[kind] += 1
        call = self._calls[name] = Call(self._finish, Record(Kind.READY, *name), pieces, take, self._peers)
        while self._windows.gone:
            news = Record(Kind.GONE, *name, window=self._windows.gone.pop())
            for peer in self._peers:
                self._send(peer, news)
        # places of copies, by the data's address and size: one serves all peers
        staged: dict[tuple[int, int], tuple[int, int]] = {}
        for peer in self._peers:
            self._announce(call, peer, outgoing[peer], staged)
        for peer, record in self._early.pop(name, {}).items():
            self._on_ready(call, peer, record)
        self._serve(0.0)
        return call

    def _announce(self, call: Call, peer: int, data: Tensor, staged: dict[tuple[int, int], tuple[int, int]]) -> None:
        """Tell ``peer`` where ``data`` lie."""
        if not data.numel():
            self._send(peer, call.ready)
            return
        address, start = data.data_ptr(), data.untyped_storage().data_ptr()
        window, offset = self._windows.at.get(start, (-1, 0))
        offset += address - start
        if window < 0:
            name = address, data.nbytes
            if name not in staged:
                staged[name] = self._stage(call, data)
            window, offset = staged[name]
        record = Record(*call.ready[:3], window, offset, data.nbytes)
        self._send(peer, record)

    def _stage(self, call: Call, data: Tensor) -> tuple[int, int]:
        """Copy ``data`` to a window."""
        memory = self._spare.pop() if self._spare else data.new_empty(0)
        if memory.numel() < data.nbytes:
            memory = self.allocate(data.nbytes, torch.empty(0, dtype=torch.uint8))
        memory[: data.nbytes].copy_(data.view(torch.uint8))
        call.staged.append(memory)
        return self._windows.at[memory.data_ptr()]

    def _finish(self, call: Call) -> None:
        """Return when ``call`` is over and all records have left: who returns may end, and its sockets with it.

        Raises:
            PeerLostError: A rank has ended.
            TimeoutError: A rank did not join in time.
        """
        deadline, notice = time.monotonic() + self._timeout, _NOTICE
        while not call.over or any(self._unsent.values()):
            late = sorted(call.unready or call.unread or (peer for peer in self._peers if self._unsent[peer]))
            for peer in late:
                if peer in self._ended:
                    raise PeerLostError(
                        f"rank {self._names[peer]} has ended while rank {self._names[self.rank]} waits for it in a "
                        "collective: its own output says why"
                    )
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"rank {self._names[self.rank]} waited {self._timeout:g} s for rank{'s' * (len(late) > 1)} "
                    f"{', '.join(str(self._names[peer]) for peer in late)} in collective {call.ready.turn} over buffer "
                    f"{call.ready.call // _VERBS}: {'not joined' if call.unready else 'joined, but did not read'}"
                )
            waited = self._timeout - left
            if waited >= notice:
                notice = self._timeout  # once
                _logger.warning(
                    "rank %d has waited %.0f s for %s in a collective; ZeroConfig.watchdog_timeout ends such a wait "
                    "and says where they are",
                    self._names[self.rank],
                    waited,
                    shown(f"rank {self._names[peer]}" for peer in late),
                )
            self._serve(min(left, notice - waited))

    def _place(self, slots: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        for peer in self._peers:
            slots[peer].copy_(pieces[peer])

    # Records #

    def _send(self, peer: int, *news: Record) -> None:
        """Send ``news`` after what did not fit before; what does not fit now is sent while others are waited for."""
        unsent, connection = self._unsent[peer], self._sockets[peer]
        unsent.extend(news)
        while unsent:
            window = unsent[0].window
            fd = self._windows.undelivered.get((window, peer))
            ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))]
            try:
                connection.sendmsg([_FORMAT.pack(*unsent[0])], ancillary)
            except (BrokenPipeError, ConnectionResetError):
                self._ended.add(peer)  # whoever waits for it says so
            except OSError as error:
                if error.errno not in _LATER:
                    raise
                if error.errno == errno.ETOOMANYREFS:
                    time.sleep(_PAUSE)  # poll() does not wait for others to take theirs
                self._poll.modify(connection, select.POLLIN | select.POLLOUT)
                return
            unsent.popleft()
            if fd is not None:
                self._windows.delivered(window, peer)

    def _serve(self, timeout: float) -> None:
        """Take in what has come and send what is left; waits up to ``timeout`` seconds for a first event."""
        for socket_fd, events in self._poll.poll(timeout * 1e3):
            peer = self._rank_of[socket_fd]
            if events & select.POLLOUT:
                self._poll.modify(socket_fd, select.POLLIN)
                self._send(peer)
            while events & ~select.POLLOUT and self._receive(peer):
                pass

    def _receive(self, peer: int) -> bool:
        """Take in one record; False if there is none."""
        try:
            data, ancillary, flags, _ = self._sockets[peer].recvmsg(_FORMAT.size, socket.CMSG_SPACE(_FD.size))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, ancillary, flags = b"", [], 0
        if not data:  # all its records have been read
            self._poll.unregister(self._sockets[peer])
            self._ended.add(peer)
            self._unsent[peer].clear()
            return False
        record = Record(*_FORMAT.unpack(data))
        name = record.call, record.turn
        if flags & socket.MSG_CTRUNC:
            raise OSError(
                errno.EMFILE,
                f"rank {self.rank} has no file descriptor left for memory of rank {peer}: raise the limit (ulimit -n), "
                "or say host_memory: false",
            )
        if ancillary:
            self._mapped[peer, record.window] = map_window(*_FD.unpack(ancillary[0][2]))
        if record.kind == Kind.GONE:
            self._mapped.pop((peer, record.window), None)
        elif record.kind == Kind.DONE:
            call = self._calls[name]
            call.unread.discard(peer)
            self._close_if_over(call)
        elif name in self._calls:
            self._on_ready(self._calls[name], peer, record)
        else:
            self._early.setdefault(name, {})[peer] = record
        return True

    def _on_ready(self, call: Call, peer: int, record: Record) -> None:
        expected = call.pieces[peer]
        if record.nbytes != expected.nbytes:
            raise RuntimeError(
                f"rank {peer} sends {record.nbytes} bytes where rank {self.rank} expects {expected.nbytes}: they are "
                "at different calls, for example because one has left a block or a step by an exception, or runs "
                "another program; ZeroConfig.fingerprint_timeout names both calls"
            )
        if record.nbytes:
            memory = self._mapped[peer, record.window]
            call.pieces[peer] = torch.frombuffer(
                memory, dtype=expected.dtype, count=expected.numel(), offset=record.offset
            )
        call.unready.discard(peer)
        if not call.unready:
            call.take(call.pieces)
            call.pieces.clear()
            for other in self._peers:
                self._send(other, Record(Kind.DONE, record.call, record.turn))
            self._close_if_over(call)

    def _close_if_over(self, call: Call) -> None:
        # pieces are empty once all have been taken
        if not call.unread and not call.pieces:
            call.over = True
            del self._calls[call.ready.call, call.ready.turn]
            self._spare += call.staged


def send_from_first(comm: Collectives, tensor: Tensor) -> None:
    """Overwrite ``tensor`` with that of ``comm``'s rank 0, by messages: other ranks of its group have no part in it."""
    flat = tensor.contiguous().view(-1)
    outgoing, incoming = [flat[:0]] * comm.size, [flat[:0]] * comm.size
    if comm.rank == 0:
        outgoing[1:] = [flat] * (comm.size - 1)
    else:
        incoming[0] = flat
    comm.exchange(outgoing, incoming, key=_PART).wait()
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view_as(tensor))
