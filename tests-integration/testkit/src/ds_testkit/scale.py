"""One of thousands of ranks, without the others: the real partitioner on tensors that have shapes and no memory.

[Note: Fake ranks]
torch's process group ``fake`` answers every collective at once and changes nothing; tensors on the device ``meta`` have
shapes and data types only. Together they run the code of one rank out of any number, on a model of any size: what it
asks for, in which order, and what it holds are the real ones; values are not. Two parts of the arithmetic look at
values or loop over them, and are replaced where the partitioner takes them as arguments: the kernels, and the rows
that the gradient norm reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ds_zero
import torch
import torch.distributed as dist
from ds_zero.collectives import collectives_of
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from .traffic import CountedCollectives, Traffic


class Measured(NamedTuple):
    """One rank after a few steps."""

    traffic: Traffic  # of the last step
    memory: ds_zero.MemoryReport
    receive_bytes: int  # buffers that gradients of the other ranks arrive in
    largest_rows_bytes: int  # what the gradient norm gathers at a time
    num_params: int
    padding: int  # elements of all flats that belong to no parameter
    flats: list[int]  # length of each, in the order of the units
    segments: list[int]  # elements of each of the optimizer's parameters: without what is padding


@contextmanager
def fake_ranks(size: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """Be rank ``rank`` of ``size`` within the block; see [Note: Fake ranks]."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


class ShapeKernels:
    """Kernels that give results of the right shape."""

    def tree_sum(self, out: Tensor, pieces: Sequence[Tensor]) -> None:
        assert all(piece.shape == out.shape for piece in pieces)

    def chunk_sumsq(self, x: Tensor, chunk: int) -> Tensor:
        assert x.numel() % chunk == 0
        return x.new_empty(x.numel() // chunk, dtype=torch.float64)


class ReadableRows(CountedCollectives):
    """Counted collectives whose gathered rows can be read: zeros in real memory."""

    largest_bytes = 0

    def gather_rows(self, row: Tensor) -> Tensor:
        self.largest_bytes = max(self.largest_bytes, self.size * row.nbytes)
        return torch.zeros(super().gather_rows(row).shape, dtype=row.dtype, device="cpu")


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3)


def measure(
    make_model: Callable[[], nn.Module],
    make_loss: Callable[[nn.Module], Tensor],
    stage: int,
    size: int,
    *,
    steps: int = 2,
    rank: int = 0,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    precision: ds_zero.Precision | None = None,
) -> Measured:
    """Partition and train on one of ``size`` fake ranks, and count.

    Args:
        make_model: Makes the model; called with ``meta`` as the default device.
        make_loss: Runs its forward pass on some batch; likewise.
        stage: ZeRO stage.
        size: Number of ranks.
        steps: Optimizer steps of one micro-batch each; the last one is counted.
        rank: Which rank.
        make_optimizer: As for :func:`ds_zero.shard`.
        precision: Data types; None: bfloat16 compute.
    """
    traffic, kernels = Traffic(), ShapeKernels()
    with fake_ranks(size, rank) as group, torch.device("meta"):
        inner: Any = collectives_of(group, kernels, device=torch.device("meta"))
        comm = ReadableRows(inner, traffic)
        model = make_model()
        num_params = sum(param.numel() for param in model.parameters())
        sharded = ds_zero.shard(
            model,
            make_optimizer,
            config=ds_zero.ZeroConfig(stage=stage),
            group=group,
            precision=precision or ds_zero.Precision(compute=torch.bfloat16),
            parts=ds_zero.Parts(kernels=kernels, collectives=comm),
        )
        for _ in range(steps):
            traffic.clear()
            make_loss(model).backward()
            sharded.grad_norm()
            sharded.step()
    flats = [flat for unit in sharded._units for flat in unit.flats]
    return Measured(
        traffic=traffic,
        memory=sharded.memory(),
        receive_bytes=sum(buffer.nbytes for buffer in inner._scratch),
        largest_rows_bytes=comm.largest_bytes,
        num_params=num_params,
        padding=sum(flat.layout.padding for flat in flats),
        flats=[flat.layout.length for flat in flats],
        segments=[segment.master.numel() for flat in flats for segment in flat.segments],
    )
