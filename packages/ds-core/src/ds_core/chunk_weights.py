"""All weights of a model whose stages are on several ranks: to files, one a stage, or to one rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ._control import everybody, together

if TYPE_CHECKING:
    from ._control import Control
    from .protocols import Json, Sharded

_SUFFIX = ".safetensors"


class ChunkWeights:
    """Plays the role ``Weights`` for the stages of one rank of a pipeline.

    Args:
        chunks: The stages of this rank.
        control: The ranks of the pipeline.
        writes: Whether this rank writes, and has what is written: the first of those with the same stages.
        group: The ranks of the pipeline, for tensors; None: there is one.
    """

    def __init__(
        self, chunks: Mapping[int, Sharded], control: Control, *, writes: bool, group: dist.ProcessGroup | None
    ) -> None:
        self._chunks = chunks
        self._control = control
        self._writes = writes
        self._group = group

    def save(self, folder: str | os.PathLike[str], *, name: str, frozen: bool = True) -> dict[str, int]:
        """Write one safetensors file for each stage, and an index of them as Hugging Face's are.

        All ranks call it; the first data-parallel rank of each stage writes, all see the folder. Returns what this
        rank's stages have, bytes by name.

        Raises:
            ValueError: The name does not end with ``.safetensors``; or there is such a file.
            RankError: It failed on another rank of the pipeline.
        """
        if not name.endswith(_SUFFIX):
            raise ValueError(f"the file's name must end with {_SUFFIX}, got {name!r}")
        stem = name.removesuffix(_SUFFIX)
        num_stages = 1 + max(stage for row in everybody(self._control, [*self._chunks]) for stage in row)
        index: dict[str, Json] = {}
        written: dict[str, int] = {}
        with together(self._control):
            for stage, chunk in self._chunks.items():
                file = f"{stem}-{stage + 1:05d}-of-{num_stages:05d}{_SUFFIX}"
                found = chunk.weights.save(folder, name=file, frozen=frozen)
                index |= dict.fromkeys(found, file)
                written |= found
        rows = everybody(self._control, [index, sum(written.values())])
        with together(self._control):
            if self._control.rank == 0 and self._writes:
                weight_map = {key: file for row in rows for key, file in row[0].items()}
                whole = {"metadata": {"total_size": sum(row[1] for row in rows)}, "weight_map": weight_map}
                with Path(folder, f"{name}.index.json").open("x") as file_object:
                    json.dump(whole, file_object, indent=2)
        return written

    def state_dict(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Return all weights in host memory on rank 0, and nothing elsewhere; all ranks call it.

        They come stage by stage, one tensor after the other.
        """
        own = {
            key: value
            for chunk in self._chunks.values()
            for key, value in chunk.weights.state_dict(frozen=frozen).items()
        }
        if not self._writes:
            return {}
        plan = everybody(self._control, [[key, [*value.shape], str(value.dtype)] for key, value in own.items()])
        if self._control.rank:
            for value in own.values():
                dist.send(value.contiguous(), group=self._group, group_dst=0)
            return {}
        for rank, row in enumerate(plan):
            for key, shape, dtype in row if rank else []:
                value = own[key] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
                dist.recv(value, group=self._group, group_src=rank)
        return own
