"""How many bytes communication moved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Counts bytes that one rank exchanged with others; what stays on the rank is not counted.

    Contents of messages only, without the headers of the network's protocols.

    Example:
        >>> traffic = Traffic()
        >>> traffic.count(sent=300, received=100)
        >>> traffic
        Traffic(sent=300, received=100, calls=1)
    """

    sent: int = 0
    """Bytes to other ranks."""
    received: int = 0
    """Bytes from other ranks."""
    calls: int = 0
    """Collective operations."""

    def count(self, *, sent: int, received: int) -> None:
        """Add the bytes of one collective operation."""
        self.sent += sent
        self.received += received
        self.calls += 1
