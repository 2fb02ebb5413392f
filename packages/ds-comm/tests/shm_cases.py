"""Random collectives, and what each must give: computed from all ranks' data, which every rank knows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_ARITHMETIC = ("SUM", "PRODUCT", "MIN", "MAX")
_BITS = ("BAND", "BOR", "BXOR")
_STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}
reduce_scatter_single = vars(dist).get("reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather_single = vars(dist).get("all_gather_single", dist.all_gather_into_tensor)


class Case(NamedTuple):
    verb: str
    dtype: torch.dtype
    op: str
    numel: int  # of a piece
    root: int
    seed: int

    def data(self, rank: int, numel: int) -> Tensor:
        """What ``rank`` starts from."""
        return values(self.dtype, numel, self.seed + rank)


def values(dtype: torch.dtype, numel: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return torch.randn(numel, generator=made).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (numel,), generator=made).to(dtype)


def draw(rng: random.Random, size: int, numels: list[int]) -> Case:
    dtype = rng.choice(FLOATS + INTEGERS)
    ops = (*_ARITHMETIC, "AVG") if dtype in FLOATS else _ARITHMETIC + _BITS
    return Case(
        rng.choice(list(VERBS)), dtype, rng.choice(ops), rng.choice(numels), rng.randrange(size), rng.randrange(1 << 30)
    )


def reduced(tensors: list[Tensor], op: str) -> Tensor:
    """Reduce in the order of ranks, 16-bit floats in float32."""
    dtype = tensors[0].dtype
    if dtype == torch.bool:
        op = {"SUM": "MAX", "PRODUCT": "MIN"}.get(op, op)
    wide = torch.float32 if dtype.itemsize == 2 and dtype.is_floating_point else dtype
    total = tensors[0].to(wide)
    for each in tensors[1:]:
        total = _STEPS[op](total, each.to(wide))
    return (total / len(tensors) if op == "AVG" else total).to(dtype)


# Each returns what it got and what it should have got #

Result = tuple[Tensor, Tensor]


def all_reduce(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    tensor = case.data(rank, case.numel)
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, case.op), group=group)
    return tensor, reduced([case.data(r, case.numel) for r in range(size)], case.op)


def reduce(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    tensor = case.data(rank, case.numel)
    dist.reduce(tensor, op=getattr(dist.ReduceOp, case.op), group=group, group_dst=case.root)
    everyone = [case.data(r, case.numel) for r in range(size)]
    return tensor, reduced(everyone, case.op) if rank == case.root else everyone[rank]


def broadcast(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    tensor = case.data(rank, case.numel)
    dist.broadcast(tensor, group=group, group_src=case.root)
    return tensor, case.data(case.root, case.numel)


def all_gather(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    data = case.data(rank, case.numel)
    pieces = [torch.empty_like(data) for _ in range(size)]
    dist.all_gather(pieces, data, group=group)
    return torch.cat(pieces), torch.cat([case.data(r, case.numel) for r in range(size)])


def all_gather_into(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    out = torch.empty(size * case.numel, dtype=case.dtype)
    own = out[rank * case.numel : (rank + 1) * case.numel].copy_(case.data(rank, case.numel))
    data = own if case.seed % 2 else own.clone()  # in place, or not
    all_gather_single(out, data, group=group)
    return out, torch.cat([case.data(r, case.numel) for r in range(size)])


def gather(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    data = case.data(rank, case.numel)
    pieces = [torch.empty_like(data) for _ in range(size)] if rank == case.root else None
    dist.gather(data, pieces, group=group, group_dst=case.root)
    if pieces is None:
        return data, data
    return torch.cat(pieces), torch.cat([case.data(r, case.numel) for r in range(size)])


def scatter(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    out = torch.empty(case.numel, dtype=case.dtype)
    pieces = [case.data(r, case.numel) for r in range(size)]
    dist.scatter(out, pieces if rank == case.root else None, group=group, group_src=case.root)
    return out, pieces[rank]


def reduce_scatter(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    out = torch.empty(case.numel, dtype=case.dtype)
    everyone = [list(case.data(r, size * case.numel).view(size, -1).unbind()) for r in range(size)]
    dist.reduce_scatter(out, everyone[rank], op=getattr(dist.ReduceOp, case.op), group=group)
    return out, reduced([pieces[rank] for pieces in everyone], case.op)


def reduce_scatter_whole(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    everyone = [case.data(r, size * case.numel) for r in range(size)]
    data = everyone[rank].clone()
    # into its own slice of the input, or not
    out = data[rank * case.numel : (rank + 1) * case.numel] if case.seed % 2 else torch.empty(case.numel).to(case.dtype)
    reduce_scatter_single(out, data, op=getattr(dist.ReduceOp, case.op), group=group)
    return out, reduced([each.view(size, -1)[rank] for each in everyone], case.op)


def all_to_all(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    rows = [case.data(r, size * case.numel).view(size, -1) for r in range(size)]
    outs = [torch.empty(case.numel, dtype=case.dtype) for _ in range(size)]
    dist.all_to_all(outs, list(rows[rank].unbind()), group=group)
    return torch.cat(outs), torch.cat([row[rank] for row in rows])


def all_to_all_uneven(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    rng = random.Random(case.seed)
    table = [[rng.randrange(case.numel + 1) for _ in range(size)] for _ in range(size)]  # sender, receiver
    sent = [case.data(r, sum(table[r]) * 3).view(-1, 3) for r in range(size)]
    takes = [table[r][rank] for r in range(size)]
    out = torch.empty(sum(takes), 3, dtype=case.dtype)
    dist.all_to_all_single(out, sent[rank], takes, table[rank], group=group)
    return out, torch.cat([sent[r].split(table[r])[rank] for r in range(size)])


def barrier(case: Case, rank: int, size: int, group: dist.ProcessGroup) -> Result:
    dist.barrier(group=group)
    return torch.zeros(1), torch.zeros(1)


VERBS = {
    verb.__name__: verb
    for verb in (
        all_reduce,
        reduce,
        broadcast,
        all_gather,
        all_gather_into,
        gather,
        scatter,
        reduce_scatter,
        reduce_scatter_whole,
        all_to_all,
        all_to_all_uneven,
        barrier,
    )
}
