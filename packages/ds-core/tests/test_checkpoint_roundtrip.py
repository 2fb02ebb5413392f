"""What one set of ranks wrote, any other set reads back bit by bit."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ds_core.checkpoint import load_full, open_checkpoint, verify
from ds_core.checkpoint.container import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from .checkpoint_kit import TINY, Held, State, deal, same_bits, save_one, save_ranks, whole

SETTINGS = settings(database=None, deadline=None, max_examples=60)

# 17 elements of 8 bytes: several pieces, and more than one file, at the sizes of TINY.
shapes = st.lists(st.integers(0, 5), max_size=3).map(torch.Size)


@st.composite
def random_tensors(draw):
    tensors = {}
    for index in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["param", "buffer", "exp_avg"]))
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(shapes)
        raw = draw(st.binary(min_size=shape.numel() * 8, max_size=shape.numel() * 8))
        # Any bytes are values of any type, except that a bool is 0 or 1.
        flat = torch.tensor(list(raw), dtype=torch.uint8)[: shape.numel() * dtype.itemsize]
        flat = flat % 2 if dtype == torch.bool else flat
        tensors[f"{role}/t{index}"] = flat.view(dtype).view(shape)
    return tensors


@SETTINGS
@given(
    tensors=random_tensors(),
    num_writers=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    reads=st.lists(st.integers(0, 30), max_size=5),
)
def test_any_writers_any_readers(tensors, num_writers, cuts, reads):
    with tempfile.TemporaryDirectory() as folder:
        states = deal(tensors, num_writers, cuts, {"step": 3})
        results = save_ranks(Path(folder), "a", states, run={"epoch": 1.5})
        assert results == [Path(folder) / "a"] * num_writers
        assert verify(Path(folder) / "a") == []
        checkpoint = open_checkpoint(folder)
        assert checkpoint.world_size == num_writers
        assert (dict(checkpoint.scalars), dict(checkpoint.run)) == ({"step": 3}, {"epoch": 1.5})
        assert dict(checkpoint.shapes) == dict(states[0].shapes)
        for key, tensor in tensors.items():
            role, _, name = key.partition("/")
            edges = [0, *sorted(edge for edge in reads if edge <= tensor.numel()), tensor.numel()]
            for start, end in pairwise(edges):
                out = torch.empty(end - start, dtype=tensor.dtype)
                checkpoint.read(role, name, start, out)
                assert same_bits(out, tensor.reshape(-1)[start:end])


def test_pieces_that_stand_in_the_manifest_in_another_order(tmp_path):
    tensor = torch.arange(40.0)
    save_ranks(tmp_path, "a", deal({"param/w": tensor}, 2, [10, 20, 30]))
    out = torch.zeros(24)
    open_checkpoint(tmp_path).read("param", "w", 8, out)
    assert torch.equal(out, tensor[8:32])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_whole_tensors_of_every_type(tmp_path, dtype):
    values = torch.arange(24).reshape(2, 3, 4) % 2
    tensors = {"param/w": values.to(dtype), "param/scalar": torch.ones((), dtype=dtype)}
    tensors["param/none"] = torch.empty(3, 0, dtype=dtype)
    save_one(tmp_path, "a", tensors)
    full = load_full(tmp_path)
    assert sorted(full) == ["none", "scalar", "w"]
    assert all(same_bits(full[key.partition("/")[2]], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("path", ["dir", "dir/a"])
def test_load_full_takes_a_tag_folder_or_the_directory(tmp_path, path):
    save_one(tmp_path / "dir", "a", {"param/w": torch.ones(2), "exp_avg/w": torch.zeros(2)})
    assert load_full(tmp_path / path)["w"].tolist() == [1.0, 1.0]
    assert load_full(tmp_path / path, role="exp_avg")["w"].tolist() == [0.0, 0.0]


def test_load_full_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(save_one(tmp_path, "a", {"param/w": torch.ones(2)}))
    assert load_full(".")["w"].tolist() == [1.0, 1.0]


def test_load_full_of_an_unknown_role_names_those_there_are(tmp_path):
    save_one(tmp_path, "a", {"param/w": torch.ones(2), "exp_avg/w": torch.ones(2)})
    with pytest.raises(ValueError, match="roles exp_avg, param; got 'momentum'"):
        load_full(tmp_path, role="momentum")


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_reading_into_another_type_converts(tmp_path, saved, wanted):
    tensor = torch.linspace(-2, 2, 30).to(saved)
    save_one(tmp_path, "a", {"param/w": tensor})
    out = torch.zeros(13, dtype=wanted)
    open_checkpoint(tmp_path).read("param", "w", 7, out)
    assert same_bits(out, tensor[7:20].to(wanted))


def test_reading_into_a_parameter_and_into_a_strided_tensor(tmp_path):
    save_one(tmp_path, "a", {"param/w": torch.arange(30.0)})
    checkpoint = open_checkpoint(tmp_path)
    parameter = torch.nn.Parameter(torch.zeros(30))
    checkpoint.read("param", "w", 0, parameter)
    assert torch.equal(parameter.detach(), torch.arange(30.0))
    strided = torch.zeros(20)[::2]
    checkpoint.read("param", "w", 5, strided)
    assert strided.tolist() == list(range(5, 15))


def test_strided_and_trainable_pieces_are_saved_as_they_look(tmp_path):
    columns = torch.arange(60.0).reshape(30, 2)
    parameter = torch.nn.Parameter(torch.arange(9.0))
    pieces = [
        Held("odd", "param", torch.Size([30]), 0, columns[:, 1]),
        Held("even", "param", torch.Size([30]), 0, columns[:, 0]),
        Held("p", "param", torch.Size([9]), 0, parameter),
        Held("third", "param", torch.Size([3]), 0, parameter[::3]),
    ]
    state = State(pieces, {piece.name: piece.shape for piece in pieces}, {})
    save_ranks(tmp_path, "a", [state])
    full = load_full(tmp_path)
    assert torch.equal(full["odd"], columns[:, 1])
    assert torch.equal(full["even"], columns[:, 0])
    assert torch.equal(full["p"], parameter.detach())
    assert full["third"].tolist() == [0.0, 3.0, 6.0]
    assert parameter.requires_grad
    assert parameter.grad is None


def test_a_parameter_without_elements_needs_no_piece(tmp_path):
    state = whole({"param/w": torch.ones(3)})
    shapes = {**state.shapes, "none": torch.Size([0, 5])}
    save_ranks(tmp_path, "a", [state._replace(shapes=shapes)])
    checkpoint = open_checkpoint(tmp_path)
    assert dict(checkpoint.shapes) == shapes
    checkpoint.read("param", "none", 0, torch.empty(0, dtype=torch.bfloat16))
    assert load_full(tmp_path)["none"].shape == (0, 5)
    assert verify(tmp_path / "a") == []


def test_a_rank_without_pieces_takes_part(tmp_path):
    states = [whole({"param/w": torch.ones(3)}), State([], {"w": torch.Size([3])}, {})]
    assert save_ranks(tmp_path, "a", states) == [tmp_path / "a"] * 2
    assert open_checkpoint(tmp_path).world_size == 2
    assert not list((tmp_path / "a").glob("shard-00001-*"))


@pytest.mark.parametrize(
    ("role", "name", "start", "shape"),
    [
        ("param", "w", 0, [31]),
        ("param", "w", 30, [1]),
        ("param", "w", -1, [1]),
        ("param", "w", 0, [2, 3]),
        ("param", "v", 0, [1]),
        ("exp_avg", "w", 0, [1]),
    ],
)
def test_a_request_for_what_is_not_there_changes_nothing(tmp_path, role, name, start, shape):
    save_one(tmp_path, "a", {"param/w": torch.ones(30)})
    out = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{name}"):
        open_checkpoint(tmp_path).read(role, name, start, out)
    assert not out.any()


def test_a_big_endian_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(NotImplementedError, match="big-endian"):
        save_one(tmp_path, "a", {"param/w": torch.ones(1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_are_staged_and_read_back(tmp_path):
    tensor = torch.arange(1000.0, device="cuda")
    save_one(tmp_path, "a", {"param/w": tensor}, config=TINY)
    out = torch.zeros(900, device="cuda", dtype=torch.bfloat16)
    open_checkpoint(tmp_path).read("param", "w", 50, out)
    assert torch.equal(out, tensor[50:950].bfloat16())


def test_tied_parameters_are_read_under_all_their_names(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 2)
            self.head = torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    (path,) = save_ranks(
        tmp_path,
        "a",
        [whole({"param/embed.weight": model.embed.weight.detach()}, {"aliases": {"head.weight": "embed.weight"}})],
    )
    other.load_state_dict(load_full(path))
    assert torch.equal(other.head.weight, model.embed.weight)
