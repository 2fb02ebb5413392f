"""What does not fit is refused, with the name, what held and what was got."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ds_kernels import AdamHyper, CpuBackend

NAMES = ("param", "grad", "exp_avg", "exp_avg_sq", "copy")


def step_with(backend, hyper, **replaced):
    state = {name: torch.zeros(12) for name in NAMES[:-1]} | {"copy": torch.zeros(12, dtype=torch.bfloat16)}
    state.update(replaced)
    backend.adamw(*(state[name] for name in NAMES[:-1]), copy=state["copy"], hyper=hyper)


@pytest.mark.parametrize("name", ["param", "exp_avg", "exp_avg_sq"])
def test_the_state_must_be_float32(backend, hyper, name):
    with pytest.raises(ValueError, match=rf"^{name} must be torch.float32; got torch.bfloat16"):
        step_with(backend, hyper, **{name: torch.zeros(12, dtype=torch.bfloat16)})


def test_the_gradient_must_be_a_float(backend, hyper):
    with pytest.raises(ValueError, match=r"^grad must be torch.float32 or .*; got torch.float64"):
        step_with(backend, hyper, grad=torch.zeros(12, dtype=torch.float64))


def test_the_copy_must_be_of_low_precision(backend, hyper):
    with pytest.raises(ValueError, match=r"^copy must be torch.bfloat16 or torch.float16; got torch.float32"):
        step_with(backend, hyper, copy=torch.zeros(12))


@pytest.mark.parametrize("name", NAMES[1:])
def test_lengths_must_agree(backend, hyper, name):
    dtype = torch.bfloat16 if name == "copy" else torch.float32
    with pytest.raises(ValueError, match=rf"same number of elements; got 12 in param and 13 in {name}"):
        step_with(backend, hyper, **{name: torch.zeros(13, dtype=dtype)})


@pytest.mark.parametrize("name", NAMES)
def test_memory_must_be_contiguous(backend, hyper, name):
    dtype = torch.bfloat16 if name == "copy" else torch.float32
    with pytest.raises(ValueError, match=rf"^{name} must be dense and contiguous"):
        step_with(backend, hyper, **{name: torch.zeros(24, dtype=dtype)[::2]})


def test_a_sparse_gradient_is_refused(backend, hyper):
    with pytest.raises(ValueError, match=r"^grad must be dense and contiguous; got torch.sparse_coo"):
        step_with(backend, hyper, grad=torch.ones(12).to_sparse())


def test_tensors_must_be_on_one_device(backend, hyper):
    with pytest.raises(ValueError, match=r"on one device; got cpu for param and meta for grad"):
        step_with(backend, hyper, grad=torch.zeros(12, device="meta"))


def test_the_cpu_backend_works_in_host_memory_only(cpu, hyper):
    other = dict.fromkeys(NAMES[:-1], torch.zeros(12, device="meta"))
    with pytest.raises(ValueError, match=r"'cpu' works on tensors in host memory; got param on meta"):
        step_with(cpu, hyper, **other, copy=None)
    with pytest.raises(ValueError, match=r"got out on meta"):
        cpu.tree_sum(torch.zeros(2, device="meta"), [torch.zeros(2, device="meta")])
    with pytest.raises(ValueError, match=r"got x on meta"):
        cpu.chunk_sumsq(torch.zeros(64, device="meta"), 64)


def test_steps_count_from_one(hyper):
    with pytest.raises(ValueError, match=r"step counts from 1.*got 0"):
        dataclasses.replace(hyper, step=0)
    assert AdamHyper(step=1, lr=0.0).step == 1


def test_an_instruction_set_the_processor_lacks(cpu):
    backend = CpuBackend(isa="sse9")
    assert "got 'sse9'" in backend.unusable()
    with pytest.raises(ValueError, match=r"isa must be one this processor runs .*scalar.*; got 'sse9'"):
        backend.chunk_sumsq(torch.ones(64), 64)


def test_tree_sum_needs_pieces(backend):
    with pytest.raises(ValueError, match=r"at least one piece"):
        backend.tree_sum(torch.zeros(3), [])


def test_pieces_must_agree(backend):
    with pytest.raises(ValueError, match=r"^pieces\[1\] must be torch.bfloat16; got torch.float32"):
        backend.tree_sum(torch.zeros(3), [torch.zeros(3).bfloat16(), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"got 3 in out and 4 in pieces\[1\]"):
        backend.tree_sum(torch.zeros(3), [torch.zeros(3), torch.zeros(4)])
    with pytest.raises(ValueError, match=r"^pieces\[0\] must be .*got torch.int32"):
        backend.tree_sum(torch.zeros(3), [torch.zeros(3, dtype=torch.int32)])


def test_out_must_not_overlap_a_piece_in_part(backend):
    memory = torch.zeros(10)
    with pytest.raises(ValueError, match=r"must not overlap one in part.*pieces\[1\]"):
        backend.tree_sum(memory[:8], [torch.zeros(8), memory[2:]])
    half = memory.view(torch.bfloat16)[:10]
    with pytest.raises(ValueError, match=r"must not overlap one in part"):
        backend.tree_sum(memory, [half])
    backend.tree_sum(memory[:5], [memory[5:], memory[:5]])


@pytest.mark.parametrize("chunk", [0, -64, 32, 65])
def test_chunks_are_whole_blocks(backend, chunk):
    with pytest.raises(ValueError, match=rf"positive multiple of 64; got {chunk}"):
        backend.chunk_sumsq(torch.zeros(128), chunk)


def test_the_array_is_whole_chunks(backend):
    with pytest.raises(ValueError, match=r"whole chunks of 128 elements; got 192"):
        backend.chunk_sumsq(torch.zeros(192), 128)
    with pytest.raises(ValueError, match=r"^x must be .*got torch.int64"):
        backend.chunk_sumsq(torch.zeros(64, dtype=torch.int64), 64)
    with pytest.raises(ValueError, match=r"^x must be dense and contiguous"):
        backend.chunk_sumsq(torch.zeros(128)[::2], 64)
