"""Connections between the processes of one host.

[Note: Links]
Each pair of ranks shares one Unix socket of sequenced packets: a record arrives whole or not at all, descriptors ride
along with it, and a process that ends, however it ends, closes its side, so that its peers know at once. The kernel's
socket also orders memory: what was written before a record was sent is seen by whoever received it. Addresses are
*abstract* (no file), random, and checked by a token that travels over the process group.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

_HANDSHAKE = struct.Struct("<q16s")
_ADDRESS = b"\0ds-zero-"
_ADDRESS_BYTES = len(_ADDRESS) + 16
_CARD = struct.Struct("<b32s32s16s")  # whether a rank can be reached, a digest of its host, its address, its token


def connect(group: dist.ProcessGroup, members: Sequence[int], timeout: float) -> dict[int, socket.socket] | None:
    """Connect this rank to the others of ``members``; None, on all of them, where they are not on one Linux host.

    Args:
        group: All its ranks call this function, each with the members it belongs to.
        members: Ranks of ``group``, in one order on all of them.
        timeout: Seconds.

    Returns:
        One socket per other member, by its index in ``members``; see [Note: Links]. Costs one small collective.

    Raises:
        TimeoutError: A rank did not connect within ``timeout`` seconds.
    """
    own, token = members.index(dist.get_rank(group)), secrets.token_bytes(16)
    host = _host()
    listener = None if host is None else _listen(len(members))
    mine = None if host is None or listener is None else _Card(_digest(host), listener.getsockname(), token)
    everyone = _exchange(mine, group)
    present = [one for one in (everyone[member] for member in members) if one is not None]
    if listener is None or len(present) < len(members) or len({host for host, _, _ in present}) > 1:
        if listener is not None:
            listener.close()
        return None
    peers: dict[int, socket.socket] = {}
    with listener:
        listener.settimeout(timeout)
        for other in range(own):
            _, address, other_token = present[other]
            peers[other] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peers[other].settimeout(timeout)
            peers[other].connect(address)
            peers[other].send(_HANDSHAKE.pack(own, other_token))
        while len(peers) < len(members) - 1:
            peer, _ = listener.accept()
            peer.settimeout(timeout)
            other, shown = _HANDSHAKE.unpack(peer.recv(_HANDSHAKE.size).ljust(_HANDSHAKE.size, b"\0"))
            if not secrets.compare_digest(shown, token):
                peer.close()  # a stranger
                continue
            peers[other] = peer
    return peers


class _Card(NamedTuple):
    """Where a rank is reached."""

    host: bytes
    address: bytes
    token: bytes


def _exchange(mine: _Card | None, group: dist.ProcessGroup) -> list[_Card | None]:
    """Return every rank's card; torch's exchange of objects would need NumPy, and pickles."""
    packed = _CARD.pack(int(mine is not None), *(mine or (b"", b"", b"")))
    row = torch.tensor(list(packed), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    fields = [_CARD.unpack(bytes(row.tolist())) for row in rows]
    return [
        _Card(host, address[:_ADDRESS_BYTES], token) if reachable else None
        for reachable, host, address, token in fields
    ]


def _digest(host: str) -> bytes:
    return hashlib.blake2b(host.encode(), digest_size=32).digest()


def _listen(backlog: int) -> socket.socket | None:
    """Return a listening socket; None where the system lacks what windows need."""
    if not {"memfd_create", "MFD_CLOEXEC"} <= vars(os).keys():
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(_ADDRESS + secrets.token_hex(8).encode())
        listener.listen(backlog)
    except OSError:
        listener.close()
        return None
    return listener


def _host() -> str | None:
    """Return what two processes share exactly if abstract addresses of one can be reached from the other.

    None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return None
