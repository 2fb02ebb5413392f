"""The shared-memory backend: what it computes, what it refuses, what it leaves behind, and how it fits into torch."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ds_comm.shm
import pytest
import torch
import torch.distributed as dist
from ds_comm.shm import registration
from ds_testkit import Rank, RankPool
from torch import Tensor, nn

from .shm_cases import FLOATS, INTEGERS, VERBS, Case, draw, reduced, values

PACKAGE = ds_comm.__name__
pytestmark = [
    pytest.mark.rung_c,
    pytest.mark.skipif(find_spec(f"{PACKAGE}._shm") is None, reason="needs the native module"),
]


def in_group(rank: Rank, name: str, size: int, seconds: float, *args: object) -> object:
    """Call a function of this module on the first ``size`` ranks, with a group of theirs; called by all."""
    group = dist.new_group(list(range(size)), timedelta(seconds=seconds), ds_comm.shm.BACKEND)
    if rank.rank >= size:
        return None
    try:
        return globals()[name](rank._replace(size=size), group, *args)
    finally:
        dist.destroy_process_group(group)


def run(
    ranks: RankPool, function: Callable[..., Any], *args: object, size: int = 4, seconds: float = 60.0
) -> list[Any]:
    return ranks.run(in_group, function.__name__, size, seconds, *args)[:size]


def equal(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


# Results #


def mixed(rank: Rank, group: dist.ProcessGroup, count: int, numels: list[int]) -> None:
    rng = random.Random(rank.size)
    for _ in range(count):
        case = draw(rng, rank.size, numels)
        got, wanted = VERBS[case.verb](case, rank.rank, rank.size, group)
        assert equal(got, wanted), case


@pytest.mark.parametrize(("size", "count"), [(4, 1500), (3, 2500), (2, 5900), (1, 100)])
def test_ten_thousand_mixed_collectives(ranks: RankPool, size: int, count: int) -> None:
    run(ranks, mixed, count, [0, 1, 2, 3, 17, 64, 255, 1000], size=size)


def test_messages_longer_than_the_shared_memory(ranks: RankPool) -> None:
    run(ranks, mixed, 40, [30_000, 131_072, 1_000_003], size=3)


def beside_gloo(rank: Rank, group: dist.ProcessGroup) -> None:
    rng = random.Random(7)
    for _ in range(150):
        case = draw(rng, rank.size, [5, 300, 70_000])._replace(dtype=torch.int32, op="SUM")
        ours, _ = VERBS[case.verb](case, rank.rank, rank.size, group)
        gloos, _ = VERBS[case.verb](case, rank.rank, rank.size, rank.group)
        # reduce leaves what it likes on others than the root
        assert equal(ours, gloos) or (case.verb == "reduce" and rank.rank != case.root), case


def test_exact_results_are_gloos(ranks: RankPool) -> None:
    run(ranks, beside_gloo)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_kernels_are_the_same_on_every_processor(dtype: torch.dtype) -> None:
    native = importlib.import_module(f"{PACKAGE}._shm")
    ops = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
    which = [0, 1, 2, 3, 4] if dtype in FLOATS else [0, 2, 3, 4, 5, 6, 7]
    for numel in (1, 1023, 2500):
        arrays = [values(dtype, numel, seed) for seed in range(5)]
        if dtype in FLOATS:
            tiny, huge = torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max
            for place, special in enumerate((float("inf"), -float("inf"), float("nan"), tiny, huge, -0.0, 0.0)):
                arrays[place % 5][place % numel] = special
        for reduction in which:
            wanted = reduced(arrays, ops[reduction])
            for best in (True, False):
                out = torch.empty_like(arrays[0])
                format = (FLOATS + INTEGERS).index(dtype)
                native.fold(best, format, reduction, out.data_ptr(), [each.data_ptr() for each in arrays], numel)
                # a NaN has many bit patterns
                torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


# In torch #


def objects_and_messages(rank: Rank, group: dist.ProcessGroup) -> None:
    gathered: list[object] = [None] * rank.size
    dist.all_gather_object(gathered, {"rank": rank.rank}, group=group)
    assert gathered == [{"rank": r} for r in range(rank.size)]
    shared = ["x", rank.rank]
    dist.broadcast_object_list(shared, src=1, group=group)
    assert shared == ["x", 1]
    ring = torch.full((3,), float(rank.rank))
    incoming = torch.empty(3)
    there, back = (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size  # global ranks, too
    works = [dist.isend(ring, there, group=group, tag=4), dist.irecv(incoming, back, group=group, tag=4)]
    for work in works:
        work.wait()
    assert incoming.tolist() == [float(back)] * 3
    work = dist.all_reduce(ring, group=group, async_op=True)
    assert work.wait()
    assert work.is_completed()
    assert work.get_future().wait()[0] is ring
    assert dist.get_backend(group) == ds_comm.shm.BACKEND
    with dist.distributed_c10d._coalescing_manager(group=group, async_ops=True) as manager:
        dist.all_reduce(ring, group=group)
    manager.wait()


def test_objects_and_messages(ranks: RankPool) -> None:
    run(ranks, objects_and_messages, size=3)


def subsets(rank: Rank) -> None:
    for members in ([0, 3], [1, 2], [2, 0], [0, 2, 3]):
        group = dist.new_group(members, backend=ds_comm.shm.BACKEND)
        if rank.rank in members:
            tensor = torch.tensor([float(rank.rank)])
            dist.all_reduce(tensor, group=group)
            assert tensor.item() == sum(members)
            dist.broadcast(tensor.fill_(rank.rank), src=members[1], group=group)
            assert tensor.item() == members[1]
            dist.destroy_process_group(group)


def test_groups_of_some(ranks: RankPool) -> None:
    ranks.run(subsets)


def ddp(rank: Rank, group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3))
    alone = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3))
    parallel = nn.parallel.DistributedDataParallel(model, process_group=group)
    for step in range(3):
        alone.load_state_dict(model.state_dict())
        everyone = []
        for r in range(rank.size):
            alone.zero_grad()
            alone(values(torch.float32, 40 * 8, 10 * step + r).view(8, 40)).square().sum().backward()
            everyone.append([param.grad.clone() for param in alone.parameters() if param.grad is not None])
        parallel.zero_grad()
        parallel(values(torch.float32, 40 * 8, 10 * step + rank.rank).view(8, 40)).square().sum().backward()
        for param, *grads in zip(model.parameters(), *everyone):
            assert param.grad is not None
            assert equal(param.grad, reduced([grad / rank.size for grad in grads], "SUM"))
        with torch.no_grad():
            for param in model.parameters():
                param -= 1e-3 * param.grad


def test_ddp_adds_in_the_order_of_ranks(ranks: RankPool) -> None:
    run(ranks, ddp)


def apart(rank: Rank) -> list[str]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger(ds_comm.shm.__name__)
    logger.addHandler(handler)
    joining = importlib.import_module(f"{PACKAGE}.shm.joining")
    here = joining._host
    joining._host = lambda: b"host %d" % (rank.rank // 2)
    try:
        group = dist.new_group(backend=ds_comm.shm.BACKEND)
    finally:
        joining._host = here
        logger.removeHandler(handler)
    tensor = torch.tensor([float(rank.rank)])
    dist.all_reduce(tensor, group=group)
    assert tensor.item() == 6
    dist.destroy_process_group(group)
    return [record.getMessage() for record in records]


def test_ranks_of_several_hosts_use_gloo_and_say_so(ranks: RankPool) -> None:
    first, *others = ranks.run(apart)
    assert first == ["ds_shm: the ranks of this group are not on one host; it communicates over gloo"]
    assert others == [[]] * 3


# What it refuses #


def refused(rank: Rank, group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="must be contiguous"):
        dist.all_reduce(torch.zeros(4, 4).t(), group=group)
    with pytest.raises(RuntimeError, match="No backend type associated with device type meta"):
        dist.all_reduce(torch.zeros(4, device="meta"), group=group)
    with pytest.raises(ValueError, match="needs floating-point"):
        dist.all_reduce(torch.zeros(4, dtype=torch.int32), op=dist.ReduceOp.AVG, group=group)
    with pytest.raises(ValueError, match="needs integer or bool"):
        dist.all_reduce(torch.zeros(4), op=dist.ReduceOp.BXOR, group=group)
    with pytest.raises(ValueError, match="dense"):
        dist.broadcast(torch.eye(3).to_sparse(), src=0, group=group)
    with pytest.raises(ValueError, match="doesn't match total dim 0"):
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4), [1, 2], [2, 2], group=group)
    dist.barrier(group=group)  # no rank had gone ahead


def test_tensors_it_does_not_move(ranks: RankPool) -> None:
    run(ranks, refused, size=2)


def differing(rank: Rank, group: dist.ProcessGroup, kind: str) -> str:
    calls = {
        "call": lambda: dist.broadcast(torch.zeros(4), src=0, group=group),
        "dtype": lambda: dist.all_reduce(torch.zeros(4, dtype=torch.int32), group=group),
        "size": lambda: dist.all_reduce(torch.zeros(5), group=group),
        "usual": lambda: dist.all_reduce(torch.zeros(4), group=group),
    }
    with pytest.raises(dist.DistBackendError) as error:
        calls[kind if rank.rank == 1 else "usual"]()
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("call", "rank 1 calls broadcast with root 0 where rank 0 calls all_reduce"),
        ("dtype", "rank 1 and rank 0 call all_reduce with different data types"),
        ("size", "rank 1 gives 20 bytes to all_reduce where rank 0 expects 16"),
    ],
)
def test_ranks_that_make_different_calls(ranks: RankPool, kind: str, text: str) -> None:
    first, second = run(ranks, differing, kind, size=2)
    assert text in first
    assert "rank 1" in second


def late(rank: Rank, group: dist.ProcessGroup) -> tuple[str, str]:
    dist.all_reduce(torch.zeros(3), group=group)
    if rank.rank == 2:
        dist.barrier(group=rank.group)  # over gloo, when the others have given up
        dist.all_reduce(torch.zeros(3), group=group)  # to which they have given their data
    texts = []
    for _ in range(2):
        with pytest.raises(dist.DistBackendError) as error:
            dist.all_reduce(torch.zeros(3), group=group)
        texts.append(str(error.value))
    if rank.rank != 2:
        dist.barrier(group=rank.group)
    return texts[0], texts[1]


def test_a_late_rank_is_named(ranks: RankPool) -> None:
    (first, again), (second, _), (third, _), _ = run(ranks, late, seconds=0.2)
    for text in (first, second):
        assert "waited 0.2 s for rank 2 in all_reduce (collective 1 of this group): not joined" in text
    assert "cannot be used any more: timed out" in again
    assert "has given up" in third


# What it leaves #


def held() -> tuple[int, int, int]:
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("memfd:ds-comm")
    return len(os.listdir("/proc/self/fd")), mapped, len(os.listdir("/dev/shm"))


def comings_and_goings(rank: Rank) -> None:
    before = held()
    for turn in range(5):
        group = dist.new_group(backend=ds_comm.shm.BACKEND)
        dist.all_reduce(torch.ones(100), group=group)
        assert held()[1] == 1
        dist.destroy_process_group(group)
        del group
        if turn == 0:
            before = held()  # what torch keeps from its first group on
    dist.barrier(group=rank.group)
    assert held() == before


def test_groups_leave_nothing(ranks: RankPool) -> None:
    ranks.run(comings_and_goings)


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{PACKAGE}._shm", None)
    with pytest.raises(RuntimeError, match=r"needs the native module.*use the backend 'gloo'"):
        registration._native()


def test_registered_once() -> None:
    ds_comm.shm.register()
    ds_comm.shm.register()
    assert dist.is_backend_available(ds_comm.shm.BACKEND)


def test_cases_cover_every_verb() -> None:
    rng = random.Random(4)
    drawn: list[Case] = [draw(rng, 4, [1]) for _ in range(5000)]
    assert {case.verb for case in drawn} == set(VERBS)
    assert {(case.dtype, case.op) for case in drawn} >= {(torch.bfloat16, "AVG"), (torch.bool, "BXOR")}
