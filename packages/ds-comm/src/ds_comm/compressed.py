"""The role ``Collectives``, with codes for weights and gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .codec import check_codec
from .codecs.layout import FLOATS
from .coded.gather import CodedGather
from .coded.reduction import CodedReduction, Feedback
from .traffic import Traffic

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Handle

    from .codec import Codec


class Reduction(Protocol):
    """How gradients are reduced."""

    def start(self, out: Tensor, full: Tensor, key: int) -> Handle:
        """Sum slice ``rank`` of every rank's ``full`` into ``out``."""

    def state(self) -> Mapping[int, Tensor]:
        """As :meth:`CompressedCollectives.state`."""

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """As :meth:`CompressedCollectives.load_state`."""


class Account(NamedTuple):
    """Bytes of one kind of call on this rank."""

    wire: Traffic  # what went over the wire
    exact: Traffic  # what would have, without a code


class CompressedCollectives:
    """Plays the role ``Collectives``; see [Note: Compressed collectives] in ``coded``.

    Memory, besides payloads in flight: with error feedback 4 bytes for each element of what is reduced, and with
    ``differences`` 4 bytes for each element of what is gathered, on every rank.

    Args:
        inner: Carries the payloads, and everything that is not coded.
        weights: Code of ``all_gather``; None: exact.
        gradients: Code of ``reduce_scatter``; None: exact.
        error_feedback: Whether the errors of gradients are sent later; see [Note: Error feedback].
        error_beta: Decay of errors; see [Note: Averaged errors].
        error_reset: Reductions of a buffer after which its errors are dropped; None: never.
        differences: Whether ``weights`` codes what has changed; see [Note: Weight differences].
        reduction_by: In place of ``gradients``: makes what reduces them, and counts its bytes.

    Raises:
        ValueError: ``weights`` or ``gradients`` is a name in place of a codec.

    Example:
        >>> from .codecs import BlockCodec
        >>> def compressed(inner):
        ...     return CompressedCollectives(inner, weights=BlockCodec(code="int8"), gradients=BlockCodec(code="int4"))

    Reference:
        Guanhua Wang and others, ZeRO++: Extremely Efficient Collective Communication for Giant Model Training, 2023.
        Jinda Jia and others, SDP4Bit: Toward 4-bit Communication Quantization in Sharded Data Parallelism, 2024
        (differences). Xingyu Xie and others, LoCo: Low-Bit Communication Adaptor for Large-scale Model Training, 2024
        (averaged errors). Sai Praneeth Karimireddy and others, Error Feedback Fixes SignSGD, 2019.
    """

    def __init__(
        self,
        inner: Collectives,
        *,
        weights: Codec | None = None,
        gradients: Codec | None = None,
        error_feedback: bool = True,
        error_beta: float = 0.0,
        error_reset: int | None = None,
        differences: bool = False,
        reduction_by: Callable[[Traffic], Reduction] | None = None,
    ) -> None:
        check_codec("weights", weights)
        check_codec("gradients", gradients)
        self.rank = inner.rank
        self.size = inner.size
        self._inner = inner
        self._accounts: defaultdict[str, Account] = defaultdict(lambda: Account(Traffic(), Traffic()))
        self._gather: CodedGather | None = None
        self._reduction: Reduction | None = None
        if weights is not None and inner.size > 1:
            self._gather = CodedGather(inner, weights, differences=differences)
        wire = self._accounts["reduce_scatter"].wire
        if reduction_by is not None and inner.size > 1:
            self._reduction = reduction_by(wire)
        elif gradients is not None and inner.size > 1:
            feedback = Feedback(error_beta, error_reset) if error_feedback else None
            self._reduction = CodedReduction(inner, gradients, wire, feedback=feedback)

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return memory of the inner collectives."""
        return self._inner.allocate(numel, like)

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Handle:
        """Fill ``out`` (1D) with what every rank's ``shard`` was coded to, this rank's own slice included."""
        account, others = self._accounts["all_gather"], self.size - 1
        account.exact.count(sent=others * shard.nbytes, received=others * shard.nbytes)
        if self._gather is None or shard.dtype not in FLOATS:
            account.wire.count(sent=others * shard.nbytes, received=others * shard.nbytes)
            return self._inner.all_gather(out, shard, key=key)
        sent = others * self._gather.sent_bytes(shard, key)
        account.wire.count(sent=sent, received=sent)
        return self._gather.start(out, shard, key)

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Handle:
        """Sum slice ``rank`` of what every rank's ``full`` was coded to into ``out``."""
        account, moved = self._accounts["reduce_scatter"], full.nbytes // self.size * (self.size - 1)
        account.exact.count(sent=moved, received=moved)
        if self._reduction is None or full.dtype not in FLOATS:
            account.wire.count(sent=moved, received=moved)
            return self._inner.reduce_scatter(out, full, key=key)
        return self._reduction.start(out, full, key)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Handle:
        """As the inner collectives do."""
        sent, received = (
            sum(piece.nbytes for rank, piece in enumerate(pieces) if rank != self.rank)
            for pieces in (outgoing, incoming)
        )
        self._count_exact("exchange", sent, received)
        return self._inner.exchange(outgoing, incoming, key=key)

    def gather_rows(self, row: Tensor) -> Tensor:
        """As the inner collectives do."""
        self._count_exact("gather_rows", (self.size - 1) * row.nbytes, (self.size - 1) * row.nbytes)
        return self._inner.gather_rows(row)

    def broadcast(self, tensor: Tensor) -> None:
        """As the inner collectives do."""
        others = self.size - 1
        self._count_exact(
            "broadcast", others * tensor.nbytes * (self.rank == 0), min(others, 1) * tensor.nbytes * (self.rank > 0)
        )
        self._inner.broadcast(tensor)

    @property
    def accounts(self) -> Mapping[str, Account]:
        """Bytes so far, by name of the call; live."""
        return self._accounts

    def state(self) -> dict[int, Tensor]:
        """Return by key this rank's slice (1D, float32) of the sum of all ranks' errors. All ranks call it."""
        return {} if self._reduction is None else dict(self._reduction.state())

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Replace all errors by what :meth:`state` gave, on any number of ranks: this rank's slice of each sum.

        Raises:
            ValueError: There are errors, but gradients are not coded here.
        """
        if self._reduction is not None:
            self._reduction.load_state(state)
        elif state:
            raise ValueError(
                f"got errors of {len(state)} buffers, but gradients are sent exactly here, on {self.size} ranks: give "
                "a code of gradients, or drop the errors"
            )

    def _count_exact(self, op: str, sent: int, received: int) -> None:
        for traffic in self._accounts[op]:
            traffic.count(sent=sent, received=received)
