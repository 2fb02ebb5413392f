"""Connections between the processes of one host.

[Note: Links]
Each pair of ranks shares one Unix socket of sequenced packets: a record arrives whole or not at all, descriptors ride
along with it, and a process that ends, however it ends, closes its side, so that its peers know at once. The kernel's
socket also orders memory: what was written before a record was sent is seen by whoever received it. Addresses are
*abstract* (no file), random, and checked by a token that travels over the process group.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from pathlib import Path

import torch.distributed as dist

_HANDSHAKE = struct.Struct("<q16s")


def connect(group: dist.ProcessGroup, timeout: float) -> dict[int, socket.socket] | None:
    """Connect each rank of ``group`` to all others; None, on every rank, where they do not all run on one Linux host.

    All ranks call it. Costs one small collective of ``group``.

    Returns:
        One socket per other rank; see [Note: Links].

    Raises:
        TimeoutError: A rank did not connect within ``timeout`` seconds.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    listener, token = _listen(size), secrets.token_bytes(16)
    mine = None if listener is None else (_host(), listener.getsockname(), token)
    # what process groups exchange as objects is pickled, but comes from ranks that run this same program
    everyone: list[tuple[str, bytes, bytes] | None] = [None] * size
    dist.all_gather_object(everyone, mine, group=group)
    present = [one for one in everyone if one is not None]
    if listener is None or len(present) < size or len({host for host, _, _ in present}) > 1:
        if listener is not None:
            listener.close()
        return None
    peers: dict[int, socket.socket] = {}
    with listener:
        listener.settimeout(timeout)
        for other in range(rank):
            _, address, other_token = present[other]
            peers[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peers[other].settimeout(timeout)
            peers[other].connect(address)
            peers[other].send(_HANDSHAKE.pack(rank, other_token))
        while len(peers) < size - 1:
            peer, _ = listener.accept()
            peer.settimeout(timeout)
            other, shown = _HANDSHAKE.unpack(peer.recv(_HANDSHAKE.size).ljust(_HANDSHAKE.size, b"\0"))
            if not secrets.compare_digest(shown, token):
                peer.close()  # a stranger
                continue
            peers[other] = peer
    return peers


def _listen(backlog: int) -> socket.socket | None:
    """Return a listening socket; None where the system lacks what windows need."""
    if not {"memfd_create", "MFD_CLOEXEC"} <= vars(os).keys():
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(b"\0ds-zero-" + secrets.token_hex(8).encode())
        listener.listen(backlog)
    except OSError:
        listener.close()
        return None
    return listener


def _host() -> str:
    """Return what two processes share exactly if abstract addresses of one can be reached from the other."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').readlink()}"
