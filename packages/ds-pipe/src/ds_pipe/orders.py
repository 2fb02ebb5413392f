"""The fixed schedules: in which order each rank computes, as pure functions.

[Note: Letters]
p ranks, m micro-batches, v stages on each rank (*chunks*). F, I, W are the times of forward, input gradient and weight
gradient of all stages of one rank, B = I + W. Stage ``s`` lies on rank ``s % p`` (a *loop*), or in ZB-V on rank ``s``
and back again (a *V*).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from .instruction import Op


class Slot(NamedTuple):
    """One computation of a rank."""

    op: Op
    stage: int
    micro_batch: int


Order: TypeAlias = "list[list[Slot]]"
"""By rank, what it computes, in order."""


def loop(num_ranks: int, num_chunks: int = 1) -> tuple[int, ...]:
    """Return the placement that goes round: 0, 1, ..., p - 1, 0, 1, ..."""
    return tuple(range(num_ranks)) * num_chunks


def vee(num_ranks: int) -> tuple[int, ...]:
    """Return the placement that goes forth and back: 0, 1, ..., p - 1, p - 1, ..., 1, 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def gpipe(num_ranks: int, num_micro_batches: int) -> Order:
    """All forwards, then all backwards: bubble (p - 1)(F + B), all m micro-batches kept.

    Reference:
        Yanping Huang and others, GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, 2019.
    """
    return looped_bfs(num_ranks, num_micro_batches, 1)


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Order:
    """One forward, one backward: bubble (p - 1)(F + B), at most p micro-batches kept.

    Reference:
        Deepak Narayanan and others, PipeDream, 2019, as flushed in Megatron-LM, 2021.
    """
    return [_one_f_one_b(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]


def _one_f_one_b(rank: int, num_ranks: int, num_micro_batches: int) -> list[Slot]:
    lead = min(num_ranks - rank, num_micro_batches)  # forwards before the first backward
    row = [Slot(Op.F, rank, index) for index in range(lead)]
    for index in range(num_micro_batches):
        row.append(Slot(Op.B, rank, index))
        if index + lead < num_micro_batches:
            row.append(Slot(Op.F, rank, index + lead))
    return row


def interleaved(num_ranks: int, num_micro_batches: int, num_chunks: int) -> Order:
    """1F1B over v chunks a rank: bubble (p - 1)(F + B) / v for v times the messages.

    Raises:
        ValueError: m is no multiple of p.

    Reference:
        Deepak Narayanan and others, Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
        2021.
    """
    if num_micro_batches % num_ranks:
        raise ValueError(
            f"interleaved needs a multiple of the {num_ranks} ranks as number of micro-batches; got "
            f"{num_micro_batches}; take another number, or looped_bfs"
        )
    return [_interleaved(rank, num_ranks, num_micro_batches, num_chunks) for rank in range(num_ranks)]


def _interleaved(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> list[Slot]:
    total, group = num_micro_batches * num_chunks, num_ranks * num_chunks

    def slot(op: Op, turn: int) -> Slot:
        chunk = turn % group // num_ranks
        stage = (chunk if op is Op.F else num_chunks - 1 - chunk) * num_ranks + rank
        return Slot(op, stage, turn // group * num_ranks + turn % num_ranks)

    lead = min(2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks + 1, total)
    row = [slot(Op.F, turn) for turn in range(lead)]
    for turn in range(total):
        row.append(slot(Op.B, turn))
        if turn + lead < total:
            row.append(slot(Op.F, turn + lead))
    return row


def looped_bfs(num_ranks: int, num_micro_batches: int, num_chunks: int) -> Order:
    """All micro-batches through a chunk, then through the next: bubble (p - 1)(F + B) / v, all micro-batches kept.

    Each chunk is computed twice without a pause: under ZeRO-3 its parameters are gathered twice, whatever m.

    Reference:
        Joel Lamy-Poirier, Breadth-First Pipeline Parallelism, 2022.
    """
    return [
        [
            Slot(op, chunk * num_ranks + rank, index)
            for op, chunks in ((Op.F, range(num_chunks)), (Op.B, reversed(range(num_chunks))))
            for chunk in chunks
            for index in range(num_micro_batches)
        ]
        for rank in range(num_ranks)
    ]


def zb_h1(num_ranks: int, num_micro_batches: int) -> Order:
    """1F1B whose weight gradients wait until there is nothing better to do: bubble (p - 1)(F + I - W), p kept.

    Reference:
        Penghui Qi and others, Zero Bubble Pipeline Parallelism, 2023.
    """
    return [_zb_h1(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]


def _zb_h1(rank: int, num_ranks: int, num_micro_batches: int) -> list[Slot]:
    row: list[Slot] = []
    owed: list[Slot] = []  # weight gradients put off
    forwards_left = num_micro_batches - min(num_ranks - rank, num_micro_batches)
    for slot in _one_f_one_b(rank, num_ranks, num_micro_batches):
        if slot.op is Op.F:
            row.append(slot)
            continue
        row.append(slot._replace(op=Op.I))
        owed.append(slot._replace(op=Op.W))
        # rank r may be r weight gradients late: so long it waits for its first gradient less than rank 0 does. After
        # the last forward they fill the time in which gradients are on their way.
        if len(owed) > rank or not forwards_left:
            row.append(owed.pop(0))
        forwards_left -= forwards_left > 0
    return row + owed


def zb_v(num_ranks: int, num_micro_batches: int) -> Order:
    """Two chunks a rank, in a V, weight gradients apart: no rank waits between its first and last work if F = I = W.

    At most p micro-batches (2p halves) kept. Fewer than 2p - 1 micro-batches are the beginning of that schedule.

    Reference:
        Penghui Qi and others, Pipeline Parallelism with Controllable Memory, 2024.
    """
    count = max(num_micro_batches, 2 * num_ranks - 1)
    return [
        [slot for slot in _zb_v(rank, num_ranks, count) if slot.micro_batch < num_micro_batches]
        for rank in range(num_ranks)
    ]


def _zb_v(rank: int, num_ranks: int, num_micro_batches: int) -> list[Slot]:
    down, up = rank, 2 * num_ranks - 1 - rank  # the stages of this rank
    until_back = num_ranks - rank  # micro-batches that pass on the way down and up below this rank
    phases = [
        (2 * until_back - 1, [(down, "F")]),  # until the first micro-batch has come back up
        (rank, [(up, "F"), (down, "F")]),
        (until_back, [(up, "FIW")]),
        (num_micro_batches - 2 * until_back + 1 - rank, [(down, "F"), (down, "IW"), (up, "FIW")]),
        (until_back - 1, [(down, "IW"), (up, "FIW")]),
        (rank, [(down, "I"), (up, "I")]),
        (until_back, [(down, "IW")]),
        (rank, [(up, "W")]),
        (rank, [(down, "W")]),
    ]
    done: Counter[tuple[str, int]] = Counter()
    row: list[Slot] = []
    for times, work in phases:
        for stage, op in times * [(stage, op) for stage, ops in work for op in ops]:
            row.append(Slot(Op(op), stage, done[op, stage]))
            done[op, stage] += 1
    return row


def forward_only(num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Order:
    """Forwards alone, for evaluation: nothing is kept."""
    return [[slot for slot in row if slot.op is Op.F] for row in looped_bfs(num_ranks, num_micro_batches, num_chunks)]


class Named(NamedTuple):
    """A fixed schedule as users name it."""

    order: Callable[[int, int, int], Order]  # of ranks, micro-batches, chunks
    placement: Callable[[int, int], tuple[int, ...]]  # of ranks, chunks
    chunks: tuple[int, int | None]  # fewest and most stages on a rank; None: any number


def _without_chunks(order: Callable[[int, int], Order]) -> Callable[[int, int, int], Order]:
    return lambda num_ranks, num_micro_batches, _num_chunks: order(num_ranks, num_micro_batches)


ORDERS: Mapping[str, Named] = MappingProxyType(
    {
        "gpipe": Named(_without_chunks(gpipe), loop, (1, 1)),
        "1f1b": Named(_without_chunks(one_f_one_b), loop, (1, 1)),
        "interleaved": Named(interleaved, loop, (2, None)),
        "looped_bfs": Named(looped_bfs, loop, (2, None)),
        "zb_h1": Named(_without_chunks(zb_h1), loop, (1, 1)),
        "zb_v": Named(_without_chunks(zb_v), lambda num_ranks, _chunks: vee(num_ranks), (2, 2)),
        "forward_only": Named(forward_only, loop, (1, None)),
    }
)
"""Every fixed schedule, by name."""

TRAINING = tuple(name for name in ORDERS if name != "forward_only")
"""The names of those that have backward passes."""
