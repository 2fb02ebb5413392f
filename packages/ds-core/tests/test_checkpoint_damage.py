"""Every changed, cut or missing byte is found, named, and survived where another checkpoint is there."""

from __future__ import annotations

import logging
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from ds_core.checkpoint import CheckpointError, load_full, open_checkpoint, verify
from ds_core.checkpoint.manifest import decode_manifest, encode_manifest

from .checkpoint_kit import deal, save_one, save_ranks

TENSORS = {
    "param/w": torch.arange(40.0),
    "param/b": torch.arange(9, dtype=torch.int16),
    "exp_avg/w": torch.arange(40.0) + 0.5,
}


@pytest.fixture
def folder(tmp_path):
    save_ranks(tmp_path, "a", deal(TENSORS, 2, [15]), run={"step": 1})
    return tmp_path / "a"


def flip(path, position, mask=0xFF):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def read_all(checkpoint):
    for key, tensor in TENSORS.items():
        role, _, name = key.partition("/")
        out = torch.empty(tensor.numel(), dtype=tensor.dtype)
        checkpoint.read(role, name, 0, out)


def test_every_flipped_byte_is_found_by_verify_and_in_data_by_reading(folder):
    rng = random.Random(0)
    header_nbytes = {file.name: file.header_nbytes for file in manifest_of(folder).files}
    for path in sorted(folder.iterdir()):
        intact = path.read_bytes()
        # All of the ends, where formats keep what they forget to check, and a sample of the rest.
        positions = {0, 1, 7, 8, len(intact) - 1, *rng.sample(range(len(intact)), 25)}
        for position in positions:
            flip(path, position, 1 << rng.randrange(8))
            assert len(verify(folder)) == 1
            if position >= header_nbytes.get(path.name, 0):
                with pytest.raises(CheckpointError, match=re.escape(path.name)):
                    read_all(open_checkpoint(folder.parent, "a"))
            path.write_bytes(intact)
    assert verify(folder) == []


def manifest_of(folder):
    return decode_manifest((folder / "manifest.json").read_bytes())


def test_a_flipped_byte_in_data_is_told_with_file_tensor_interval_hashes_and_cure(tmp_path):
    save_one(tmp_path, "before", TENSORS)
    folder = save_one(tmp_path, "a", TENSORS)
    manifest = manifest_of(folder)
    piece = next(p for p in manifest.pieces if manifest.tensors[p.tensor].role == "exp_avg")
    name = manifest.files[piece.file].name
    flip(folder / name, piece.start_byte)
    with pytest.raises(CheckpointError) as caught:
        read_all(open_checkpoint(tmp_path))
    text = str(caught.value)
    assert f"{folder} is damaged: exp_avg/w, elements [{piece.start}, {piece.end}): " in text
    assert f"bytes [{piece.start_byte}, {piece.end_byte}) of {name} have hash " in text
    assert f"written was {piece.hash}" in text
    assert "load the checkpoint before it: tag 'before'" in text


def test_a_read_verifies_only_what_it_touches(tmp_path):
    folder = save_one(tmp_path, "a", {"param/w": torch.arange(40.0)})
    last = max(manifest_of(folder).pieces, key=lambda piece: piece.start)
    flip(folder / manifest_of(folder).files[last.file].name, last.start_byte)
    checkpoint = open_checkpoint(tmp_path)
    out = torch.zeros(last.start)
    checkpoint.read("param", "w", 0, out)
    assert torch.equal(out, torch.arange(40.0)[: last.start])
    with pytest.raises(CheckpointError, match=f"elements \\[{last.start}, 40\\)"):
        checkpoint.read("param", "w", 39, torch.zeros(1))


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_manifest_does_not_open(folder, keep):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"manifest.json: the manifest is truncated or was changed"):
        open_checkpoint(folder.parent, "a")


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "empty"])
def test_a_shard_of_the_wrong_size_does_not_open(folder, damage):
    path = folder / "shard-00001-00.safetensors"
    data = path.read_bytes()
    expected = f"has {{}} bytes, the manifest says {len(data)}"
    if damage == "missing":
        path.unlink()
        expected = "cannot be read: No such file or directory"
    else:
        data = {"shorter": data[:-1], "longer": data + b"\0", "empty": b""}[damage]
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"shard-00001-00.safetensors {expected.format(len(data))}"):
        open_checkpoint(folder.parent, "a")
    assert len(verify(folder)) == 1


def test_a_file_that_shrinks_after_opening_is_told(folder):
    checkpoint = open_checkpoint(folder.parent)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"end at byte \d+: the file is truncated"):
        read_all(checkpoint)


def test_a_file_that_vanishes_after_opening_is_told(folder):
    checkpoint = open_checkpoint(folder.parent)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_all(checkpoint)


def test_verify_needs_a_hash_over_every_byte_and_a_piece_over_every_element(folder):
    manifest = manifest_of(folder)
    forged = replace(manifest, pieces=manifest.pieces[1:])
    (folder / "manifest.json").write_bytes(encode_manifest(forged))
    first = manifest.pieces[0]
    assert sorted(verify(folder)) == sorted(
        [
            f"{manifest.tensors[first.tensor]} of shape {list(manifest.tensors[first.tensor].shape)}: "
            f"elements [{first.start}, {first.end}) stand in no piece",
            f"bytes [{first.start_byte}, {first.end_byte}) of {manifest.files[first.file].name} stand under no hash",
        ]
    )


@pytest.fixture
def history(tmp_path):
    """Three checkpoints whose names do not sort in the order of time."""
    for step, tag in enumerate(["b", "c", "a"]):
        save_one(tmp_path, tag, {"param/w": torch.full((4,), float(step))})
    return tmp_path


def test_latest_decides_even_against_newer_ones(history):
    (history / "latest").write_text("b\n")
    assert open_checkpoint(history).tag == "b"


def test_no_warning_when_latest_is_good(history, caplog):
    assert open_checkpoint(history).tag == "a"
    assert not caplog.records


@pytest.mark.parametrize("damage", ["no latest", "names nothing", "names a path", "garbage", "manifest", "shard"])
def test_without_a_good_latest_the_newest_good_one_is_opened_with_a_warning(history, caplog, damage):
    caplog.set_level(logging.WARNING)
    expected, reason = "c", "a: "
    if damage == "manifest":
        flip(history / "a/manifest.json", 30)
    elif damage == "shard":
        (history / "a/shard-00000-00.safetensors").unlink()
    elif damage == "no latest":
        (history / "latest").unlink()
        expected, reason = "a", "there is no file 'latest'"
    else:
        contents = {"names nothing": b"z\n", "names a path": b"../z", "garbage": b"\xff\0\xfe"}[damage]
        (history / "latest").write_bytes(contents)
        expected, reason = "a", {"names nothing": "no checkpoint 'z'"}.get(damage, "a tag names one folder")
    checkpoint = open_checkpoint(history)
    assert checkpoint.tag == expected
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("ds_core", logging.WARNING)
    assert f"opening {history / expected} after skipping" in record.getMessage()
    assert reason in record.getMessage()


def test_when_all_are_damaged_the_error_says_why_for_each(history):
    for tag in "abc":
        flip(history / tag / "manifest.json", 30)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(history)
    for tag in "abc":
        assert f"{tag}: {history / tag / 'manifest.json'}: the manifest is truncated" in str(caught.value)


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be opened in .*: nothing was saved there"):
        open_checkpoint(tmp_path)


def test_a_directory_that_does_not_exist_is_named_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for opening in (open_checkpoint, load_full):
        with pytest.raises(CheckpointError, match=rf"there is no folder {tmp_path}/nowhere$"):
            opening("nowhere")
    with pytest.raises(ValueError, match=rf"there is no folder {tmp_path}/nowhere, so no checkpoint 'a' in it"):
        open_checkpoint("nowhere", "a")


def test_a_checkpoint_in_place_of_its_directory_is_told_with_tag_and_directory(history):
    with pytest.raises(CheckpointError, match=rf"it is one itself: name .* {history}, and the tag 'b'"):
        open_checkpoint(history / "b")


def test_a_latest_that_names_nothing_is_told(tmp_path):
    (tmp_path / "latest").write_text("a")
    with pytest.raises(CheckpointError, match=r"found were:\n  a: there is no checkpoint 'a' in"):
        open_checkpoint(tmp_path)


def test_an_unknown_tag_is_told_with_those_there_are(history):
    with pytest.raises(ValueError, match=r"there is no checkpoint 'z' in .*; there are: a, b, c"):
        open_checkpoint(history, "z")


def test_a_damaged_tag_is_told_with_the_others(history):
    flip(history / "a/manifest.json", 30)
    with pytest.raises(CheckpointError, match=r"load another tag of .*: b, c"):
        open_checkpoint(history, "a")
    shutil.rmtree(history / "b")
    shutil.rmtree(history / "c")
    with pytest.raises(CheckpointError, match=r"there is no other checkpoint in"):
        open_checkpoint(history, "a")


def test_the_shares_of_all_ranks_find_every_flipped_byte_exactly_once(folder):
    for path in sorted(folder.glob("*.safetensors")):
        intact = path.read_bytes()
        for position in range(0, len(intact), 11):
            flip(path, position)
            found = [problem for rank in range(3) for problem in verify(folder, share=(rank, 3))]
            assert found == verify(folder)
            assert len(found) == 1
            path.write_bytes(intact)


def test_verify_tells_of_a_missing_file_and_of_a_flipped_byte_in_another(folder):
    first, *_, last = sorted(folder.glob("*.safetensors"))
    first.unlink()
    flip(last, -1)
    missing, flipped = verify(folder)
    assert missing == f"{first.name} cannot be read: No such file or directory"
    assert f"of {last.name} have hash" in flipped
