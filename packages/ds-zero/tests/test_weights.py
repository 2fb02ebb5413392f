"""Weights from and to safetensors files, in ranges and in a stream, never whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ds_zero
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import seeded
from ds_testkit.state import assembled, assert_same_bits, exported
from ds_zero.safetensors_io import TensorFiles
from torch import nn

from .helpers import Run, build, train_steps


def saved(rank: Rank, run: Run, folder: str, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(1))
    return exported(sharded), ds_zero.save_safetensors(sharded, folder, **settings)


def loaded(rank: Rank, run: Run, folder: str) -> Any:
    model, sharded = build(rank, run)
    train_steps(rank, run, model, sharded, range(2))
    assert ds_zero.load_safetensors(sharded, folder) == []
    return exported(sharded)


def only_params(pieces: Any) -> Any:
    return {key: value for key, value in assembled(pieces).items() if key[0] != "exp_avg" and key[0] != "exp_avg_sq"}


@pytest.mark.rung_c
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_on_some_ranks_and_loaded_on_others(ranks: RankPool, tmp_path: Path, compute: torch.dtype | None) -> None:
    run = Run(compute=compute, model={"tied": True})
    results = ranks.run(saved, run, str(tmp_path), {"max_shard_bytes": 20_000}, size=4)
    want = only_params(part[0] for part in results)
    assert results[3][1] == results[0][1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted({*index["weight_map"].values()}) == results[0][1]
    assert len(results[0][1]) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [*results[0][1], "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in want.values())
    for size, stage in ((1, 0), (2, 1), (4, 3), (2, 2), (4, 0)):
        assert_same_bits(only_params(ranks.run(loaded, run._replace(stage=stage), str(tmp_path), size=size)), want)


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = seeded(tied=True)
    model.register_buffer("count", torch.tensor(7))
    sharded = ds_zero.shard(model, None)
    assert ds_zero.save_safetensors(sharded, tmp_path, dtype=torch.bfloat16) == ["model.safetensors"]
    read = safetensors.load_file(tmp_path / "model.safetensors")
    named = dict(model.named_parameters())
    assert read.keys() == {*named, "count"}
    assert all(torch.equal(read[name], param.bfloat16()) for name, param in named.items())
    assert read["count"].item() == 7
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "tokens.weight"}
    theirs = {f"transformer.{name}": torch.randn_like(param) for name, param in named.items()}
    theirs["lm_head"] = theirs["transformer.tokens.weight"].clone()
    theirs["transformer.count"] = torch.tensor(3)
    theirs["rotary"] = torch.ones(2)
    safetensors.save_file(theirs, tmp_path / "theirs.safetensors")

    def rename(name: str) -> str | None:
        if name == "rotary":
            return None
        return "head.weight" if name == "lm_head" else name.removeprefix("transformer.")

    assert ds_zero.load_safetensors(sharded, tmp_path / "theirs.safetensors", rename=rename) == []
    for name, param in named.items():
        assert torch.equal(param, theirs[f"transformer.{name}"])
    assert model.count.item() == 3


def test_only_the_ranges_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = ds_zero.shard(nn.Linear(1000, 100), None)
    ds_zero.save_safetensors(sharded, tmp_path)
    with TensorFiles(tmp_path) as files:
        out = torch.empty(10, dtype=torch.float64)
        files.read("weight", 777, out)
        assert torch.equal(out.float(), sharded.module.weight.detach().reshape(-1)[777:787])
        file = files._open[tmp_path / "model.safetensors"]
        assert file.tell() == files.stored["weight"].position + 4 * 787
        many = torch.empty(100_000, dtype=torch.bfloat16)
        monkeypatch.setattr("ds_zero.safetensors_io._BUFFER_BYTES", 1 << 12)  # in many rounds
        files.read("weight", 0, many)
        assert torch.equal(many, sharded.module.weight.detach().reshape(-1).bfloat16())


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    ds_zero.save_safetensors(ds_zero.shard(nn.Linear(3, 2), None), tmp_path)
    for model, message in (
        (nn.Linear(2, 2), r"param 'weight' has shape \[2, 2\] here and \[2, 3\] there"),
        (nn.Linear(3, 2, bias=False), "tensors that the model has not: 'bias'; nothing was changed"),
        (nn.BatchNorm1d(2), "has shape|is missing there"),
    ):
        sharded = ds_zero.shard(model, None)
        before = assembled([exported(sharded)])
        with pytest.raises(ValueError, match=message):
            ds_zero.load_safetensors(sharded, tmp_path)
        assert_same_bits(assembled([exported(sharded)]), before)
    lenient = ds_zero.shard(nn.Linear(3, 2, bias=False), None)
    assert ds_zero.load_safetensors(lenient, tmp_path, strict=False) == ["bias"]
    with pytest.raises(ValueError, match=r"holds model.safetensors already: give another folder"):
        ds_zero.save_safetensors(lenient, tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    sharded = ds_zero.shard(nn.Linear(3, 2), None)
    ds_zero.save_safetensors(sharded, tmp_path / "good")
    whole = (tmp_path / "good" / "model.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content, message in (
        (whole[:-4], "the file is damaged or cut off"),
        (whole[:20], "no safetensors file, or cut off"),
        (b"\x08" + bytes(7) + b"notjson!" + whole, "its header is wrong"),
        (whole.replace(b'"F32"', b'"X99"'), "is of type X99"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ds_zero.load_safetensors(sharded, bad)
    with pytest.raises(ValueError, match="does not exist: give"):
        ds_zero.load_safetensors(sharded, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds 1 .safetensors files|holds 0 .safetensors files"):
        ds_zero.load_safetensors(sharded, (tmp_path / "empty").mkdir() or tmp_path / "empty")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"weight": "good/model.safetensors", "more": "good/model.safetensors"}}')
    with pytest.raises(ValueError, match="names tensors that its files do not hold: more"):
        ds_zero.load_safetensors(sharded, tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="it needs a table 'weight_map'"):
        ds_zero.load_safetensors(sharded, index)


def computed(rank: Rank, folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Save and return weights as the model computes with them; compare them with what it then sees."""
    model, sharded = build(rank, Run(compute=torch.bfloat16, model={"tied": True}))
    model.norm.weight.requires_grad_(requires_grad=False)
    sharded.weights.save(folder)
    sharded.weights.save(folder, name="part.safetensors", frozen=False)
    with sharded.access.gathered(model):
        seen = {name: param.detach().clone() for name, param in model.named_parameters(remove_duplicate=False)}
    return sharded.weights.state_dict(), seen


@pytest.mark.rung_c
def test_weights_are_those_that_the_model_computes_with(ranks: RankPool, tmp_path: Path) -> None:
    (held, seen), (nothing, same) = ranks.run(computed, str(tmp_path), size=2)
    assert nothing == {}
    assert held.keys() == seen.keys() == same.keys()
    for name, tensor in held.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, seen[name])
        assert torch.equal(tensor, same[name])
    with TensorFiles(tmp_path / "model.safetensors") as whole, TensorFiles(tmp_path / "part.safetensors") as part:
        assert whole.stored.keys() == seen.keys() - {"head.weight"}
        assert part.stored.keys() == whole.stored.keys() - {"norm.weight"}
        for name, stored in whole.stored.items():
            out = torch.empty(stored.shape.numel(), dtype=stored.dtype)
            whole.read(name, 0, out)
            assert torch.equal(out, seen[name].flatten())


def test_a_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    weights = ds_zero.shard(nn.Linear(3, 2), None).weights
    for name in ("pytorch_model.bin", "inner/model.safetensors"):
        with pytest.raises(ValueError, match=r"never pickled, to one file within .* ends with .safetensors, got"):
            weights.save(tmp_path, name=name)
    weights.save(tmp_path)
    weights.save(tmp_path, name="other.safetensors")
    for name in ("model.safetensors", "other.safetensors"):
        with pytest.raises(ValueError, match=f"holds {name} already"):
            weights.save(tmp_path, name=name)


def disk_full(rank: Rank, folder: str) -> tuple[str, int]:
    _, sharded = build(rank, Run())
    target = Path(folder) / "file"
    if rank.rank == 0:
        target.write_text("a file where a folder should be")
    with pytest.raises(OSError if rank.rank == 0 else RuntimeError) as error:
        ds_zero.save_safetensors(sharded, target / "inner")
    return str(error.value), len(ds_zero.save_safetensors(sharded, Path(folder) / "next"))


@pytest.mark.rung_c
def test_an_error_of_rank_0_ends_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(disk_full, str(tmp_path), size=2)
    assert "Not a directory" in results[0][0] or "File exists" in results[0][0]
    assert "rank 0 could not write" in results[1][0]
    assert [count for _, count in results] == [1, 1]


def unsaved(rank: Rank, folder: str) -> list[str]:
    """Save what the format has no name for; then let rank 0 fail in the middle, and at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sharded = ds_zero.shard(model, None, config=ds_zero.ZeroConfig(stage=3), group=rank.group)
    texts = []

    def fails(kind: type[Exception], **settings: Any) -> None:
        with pytest.raises(kind) as error:
            ds_zero.save_safetensors(sharded, folder, **settings)
        texts.append(str(error.value))

    model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    fails(ValueError)
    del model._buffers["phase"]
    fails(ValueError, dtype=torch.complex128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_zero.safetensors_io.byte_view", lambda tensor: 1 / 0)
        fails(ZeroDivisionError if rank.rank == 0 else RuntimeError)
    with pytest.MonkeyPatch.context() as patch:
        rename = Path.rename

        def once(path: Path, target: Path) -> Path:
            if "00002-of" in target.name:
                raise OSError("no space left")
            return rename(path, target)

        patch.setattr(Path, "rename", once)
        fails(OSError if rank.rank == 0 else RuntimeError, max_shard_bytes=64)
    return texts


@pytest.mark.rung_c
def test_any_failure_ends_all_ranks_and_leaves_no_file(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(unsaved, str(tmp_path / "files"), size=2)
    assert first[:2] == second[:2]
    assert first[0].startswith("'phase' is torch.complex128, for which the safetensors format has no name")
    assert first[1].startswith("'0.weight' is torch.complex128")
    assert first[2:] == ["division by zero", "no space left"]
    assert all(text.startswith("rank 0 could not write the files") for text in second[2:])
    assert list((tmp_path / "files").iterdir()) == []
