"""What stands on the disk: files, headers, manifest, and that no pickle is involved."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from ds_core import _control, checkpoint
from ds_core.checkpoint import SaveConfig, default_tag, open_checkpoint, published_tags, save
from ds_core.checkpoint.container import byte_view
from ds_core.checkpoint.manifest import decode_manifest, digest, encode_manifest
from ds_core.checkpoint.problems import CheckpointError
from ds_core.checkpoint.shards import _Staging
from safetensors import safe_open

from .checkpoint_kit import deal, same_bits, save_one, save_ranks

TENSORS = {
    "param/small": torch.tensor([True, False, True]),
    "param/w": torch.arange(60, dtype=torch.bfloat16),
    "buffer/count": torch.tensor(7),
    "exp_avg/w": torch.arange(60.0) / 3,
}


def test_names_of_files_and_contents_of_latest(tmp_path):
    save_ranks(tmp_path, default_tag(12), deal(TENSORS, 2, [20, 40]))
    folder = tmp_path / "global_step12"
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "manifest.json"
    assert {name[:12] for name in names[1:]} == {"shard-00000-", "shard-00001-"}
    assert all(name.endswith(".safetensors") for name in names[1:])
    assert (tmp_path / "latest").read_text().strip() == "global_step12"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "global_step12", "latest"]
    assert published_tags(tmp_path) == ["global_step12"]


def test_safetensors_reads_every_shard(tmp_path):
    save_ranks(tmp_path, "a", deal(TENSORS, 2, [20, 40]))
    found = {}
    for path in (tmp_path / "a").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for entry in file.keys():  # noqa: SIM118 - not a mapping
                key, _, interval = entry.removesuffix(")").rpartition("[")
                start, end = map(int, interval.split(", "))
                found.setdefault(key, []).append((start, end, file.get_tensor(entry)))
    for key, tensor in TENSORS.items():
        parts = sorted(found[key], key=lambda part: part[0])
        assert all(end - start == part.numel() for start, end, part in parts)
        assert same_bits(torch.cat([part for _, _, part in parts]), tensor.reshape(-1))


def test_files_and_pieces_keep_to_their_sizes(tmp_path):
    config = SaveConfig(part_bytes=96, piece_bytes=16)
    save_one(tmp_path, "a", TENSORS, config=config)
    manifest = decode_manifest((tmp_path / "a/manifest.json").read_bytes())
    assert len(manifest.files) > 1
    assert all(0 < file.nbytes - file.header_nbytes <= 96 for file in manifest.files)
    assert all(0 < piece.end_byte - piece.start_byte <= 16 for piece in manifest.pieces)


def test_by_default_a_small_state_is_one_file_and_a_tensor_one_entry(tmp_path):
    big = torch.zeros((40 << 20) // 4)
    save_one(tmp_path, "a", {"param/big": big}, config=SaveConfig())
    with safe_open(tmp_path / "a/shard-00000-00.safetensors", framework="pt") as file:
        assert file.keys() == [f"param/big[0, {big.numel()})"]
    manifest = decode_manifest((tmp_path / "a/manifest.json").read_bytes())
    assert [piece.end_byte - piece.start_byte for piece in manifest.pieces] == [16 << 20, 16 << 20, 8 << 20]


def test_every_tensor_is_aligned_in_its_file(tmp_path):
    save_one(tmp_path, "a", TENSORS, config=SaveConfig())
    manifest = decode_manifest((tmp_path / "a/manifest.json").read_bytes())
    for piece in manifest.pieces:
        itemsize = (piece.end_byte - piece.start_byte) // (piece.end - piece.start)
        assert piece.start_byte % itemsize == 0


def test_manifest_is_json_that_describes_every_tensor(tmp_path):
    save_ranks(tmp_path, "a", deal(TENSORS, 2, [20, 40], {"lr": 0.1}), run={"step": 3, "name": "\u00e9"})
    fields = json.loads((tmp_path / "a/manifest.json").read_text())
    assert (fields["format"], fields["version"], fields["world_size"]) == ("ds-checkpoint", 1, 2)
    assert (fields["run"], fields["scalars"]) == ({"step": 3, "name": "\u00e9"}, {"lr": 0.1})
    described = {f"{t['role']}/{t['name']}": (t["shape"], t["dtype"], t["codec"]) for t in fields["tensors"]}
    assert described == {
        "param/small": ([3], "BOOL", "raw"),
        "param/w": ([60], "BF16", "raw"),
        "buffer/count": ([], "I64", "raw"),
        "exp_avg/w": ([60], "F32", "raw"),
    }
    data = {file["name"]: (tmp_path / "a" / file["name"]).read_bytes() for file in fields["files"]}
    for piece in fields["pieces"]:
        name, tensor = fields["files"][piece["file"]]["name"], fields["tensors"][piece["tensor"]]
        raw = data[name][piece["start_byte"] : piece["end_byte"]]
        assert piece["hash"] == digest(raw)
        whole = TENSORS[f"{tensor['role']}/{tensor['name']}"].reshape(-1)
        assert raw == bytes(byte_view(whole[piece["start"] : piece["end"]]))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"version":1',
            '"version":2',
            r"format \('ds-checkpoint', 2\), this version reads .*upgrade ds-core",
        ),
        ('"codec":"raw"', '"codec":"int4"', r"reads the codec 'raw', got \['int4'\]: upgrade ds-core"),
    ],
)
def test_a_manifest_of_a_later_version_is_refused(tmp_path, old, new, message):
    path = save_one(tmp_path, "a", TENSORS) / "manifest.json"
    body = path.read_bytes()[: -len(',\n"hash":""}\n') - 32].replace(old.encode(), new.encode())
    path.write_bytes(body + f',\n"hash":"{digest(body)}"}}\n'.encode())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, "a")


def test_manifest_bytes_decode_to_what_was_encoded(tmp_path):
    data = (save_one(tmp_path, "a", TENSORS) / "manifest.json").read_bytes()
    assert encode_manifest(decode_manifest(data)) == data


def test_contiguous_cpu_memory_is_written_in_place_and_the_rest_through_one_buffer():
    staging = _Staging(64)
    live = torch.zeros(8)
    view = staging.host_view(live)
    live[0] = 1.0
    assert bytes(view) == bytes(byte_view(live))
    strided = torch.arange(32.0)[::2]
    first, second = staging.host_view(strided[:8]), staging.host_view(strided[8:])
    assert bytes(first) == bytes(second) == bytes(byte_view(strided[8:].contiguous()))


@pytest.mark.parametrize("sizes", [(0, 0), (7, 96), (32, 16), (-1, 96)])
def test_sizes_out_of_order_are_refused(sizes):
    with pytest.raises(ValueError, match=rf"got piece_bytes={sizes[0]}, part_bytes={sizes[1]}"):
        SaveConfig(piece_bytes=sizes[0], part_bytes=sizes[1])


@pytest.mark.parametrize("tag", ["", ".", "..", ".hidden", "a/b", "latest", "a\0b"])
def test_tags_that_cannot_name_a_folder_are_refused(tmp_path, tag):
    with pytest.raises(ValueError, match="a tag names one folder"):
        save_one(tmp_path, tag, TENSORS)
    with pytest.raises(ValueError, match="a tag names one folder"):
        open_checkpoint(tmp_path, tag)
    assert not list(tmp_path.iterdir())


def test_no_source_imports_pickle_or_calls_torch_save_or_load():
    package = Path(checkpoint.__file__).parent
    sources = [*package.glob("*.py"), Path(_control.__file__)]
    assert Path(save.__code__.co_filename) in sources
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {"pickle", "cloudpickle", "marshal", "numpy"} & {str(m).split(".")[0] for m in modules}
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"torch.save", "torch.load"}
                assert not node.attr.endswith(("_object", "_object_list")), "collectives of objects pickle"
