"""How the ranks of one host come to share memory.

[Note: Joining]
Each pair of ranks connects by a Unix socket whose address is *abstract* (no file), random, and checked by a token that
travels through the group's store. Over them rank 0 sends the descriptor of an anonymous segment (``memfd_create``): it
has no name in any file system, so nothing is left behind however a process ends, and the size of /dev/shm is no limit.
A rank watches its peers through process descriptors, which tell the end of the process itself; where the system gives
none, through the sockets, which a child that a peer has forked keeps open.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch._C._distributed_c10d import Store

_ADDRESS = b"\0ds-comm-"
_ADDRESS_BYTES = len(_ADDRESS) + 16
_TOKEN_BYTES = 16
_HANDSHAKE = struct.Struct(f"<q{_TOKEN_BYTES}s")
_CREDENTIALS = struct.Struct("iii")  # process, user, group


class Joined(NamedTuple):
    """What a rank holds of the memory it shares."""

    segment: int  # a descriptor; closed when it has been mapped
    watches: list[int]  # by rank: a descriptor that poll() reports when the rank has ended; -1: this one
    open: ExitStack  # closes all but the segment

    def close(self) -> None:
        """Close what is open."""
        self.open.close()


class _Card(NamedTuple):
    """Where a rank is reached."""

    host: bytes
    address: bytes
    token: bytes


def join(store: Store, rank: int, size: int, timeout: timedelta, nbytes: int) -> Joined | None:
    """Share a segment with all ranks; None, on all of them, where they are not on one Linux host.

    Args:
        store: Of this group alone.
        rank: Of this process.
        size: Number of ranks, all of which call this function.
        timeout: Until all have come.
        nbytes: Of the segment.

    Raises:
        TimeoutError: A rank did not connect in time.
    """
    with ExitStack() as kept:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            listener.bind(_ADDRESS + secrets.token_hex(8).encode())
            listener.listen(size)
            listener.settimeout(timeout.total_seconds())
            cards = _exchange(store, rank, size, timeout, _Card(_host(), listener.getsockname(), _token()))
            if len({card.host for card in cards}) > 1 or not cards[rank].host:
                return None
            peers = _connect(listener, cards, rank)
            for peer in peers.values():
                kept.enter_context(peer)
        segment = _segment(peers, rank, nbytes)
        watches = [-1 if other == rank else _watch(peers[other], kept) for other in range(size)]
        return Joined(segment, watches, kept.pop_all())


def _exchange(store: Store, rank: int, size: int, timeout: timedelta, own: _Card) -> list[_Card]:
    """Return every rank's card."""
    store.set(f"card{rank}", (own.address + own.token + own.host).hex())
    names = [f"card{other}" for other in range(size)]
    store.wait(names, timeout)
    ends = (_ADDRESS_BYTES, _ADDRESS_BYTES + _TOKEN_BYTES)
    packed = [bytes.fromhex(store.get(name).decode()) for name in names]
    return [_Card(card[ends[1] :], card[: ends[0]], card[ends[0] : ends[1]]) for card in packed]


def _connect(listener: socket.socket, cards: list[_Card], rank: int) -> dict[int, socket.socket]:
    """Return a socket to every other rank: each connects to those before it."""
    peers: dict[int, socket.socket] = {}
    for other in range(rank):
        peers[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peers[other].settimeout(listener.gettimeout())
        peers[other].connect(cards[other].address)
        peers[other].send(_HANDSHAKE.pack(rank, cards[other].token))
    while len(peers) < len(cards) - 1:
        peer, _ = listener.accept()
        peer.settimeout(listener.gettimeout())
        other, shown = _HANDSHAKE.unpack(peer.recv(_HANDSHAKE.size).ljust(_HANDSHAKE.size, b"\0"))
        if secrets.compare_digest(shown, cards[rank].token):
            peers[other] = peer
        else:
            peer.close()  # a stranger
    return peers


def _segment(peers: dict[int, socket.socket], rank: int, nbytes: int) -> int:
    """Return the descriptor of the segment that rank 0 makes."""
    if rank:
        _, (fd,), _, _ = socket.recv_fds(peers[0], 1, 1)
        return fd
    fd = os.memfd_create("ds-comm", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    for peer in peers.values():
        socket.send_fds(peer, [b"\0"], [fd])
    return fd


def _watch(peer: socket.socket, kept: ExitStack) -> int:
    process, _, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        fd = os.pidfd_open(process)
    except OSError:  # an old kernel, a process of another namespace, or one that has just ended
        return peer.fileno()
    kept.callback(os.close, fd)
    return fd


def _token() -> bytes:
    return secrets.token_bytes(_TOKEN_BYTES)


def _host() -> bytes:
    """Return what two processes share exactly if abstract addresses of one can be reached from the other.

    Empty where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}".encode()
    except OSError:
        return b""
