"""Weights of a partitioned model from and to safetensors files, without a whole copy of it anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import state
from .intervals import agreed
from .safetensors_io import Planned, SafetensorsWriter, TensorFiles, split

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Json

    from .sharded import Sharded

_MAX_SHOWN = 8  # names in one message


def load_safetensors(
    sharded: Sharded,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    rename: Callable[[str], str | None] | None = None,
) -> list[str]:
    """Load parameters and buffers from safetensors files; all ranks call it.

    Each rank reads the bytes of its own intervals only (see [Note: Reading ranges]). Memory: 4 MiB. At stages 1 and 2
    the parameters are gathered afterwards, as after a step. Optimizer state stays as it is; gradients are dropped.

    Nothing is changed before everything has been found to fit.

    Args:
        sharded: The model.
        path: A file, a Hugging Face index (``model.safetensors.index.json``), or a folder that holds one of the two,
            readable on every rank. Values are converted to float32 for what is trained, and rounded from there to the
            compute data type.
        strict: Whether a parameter or buffer that the files lack, or one of theirs that the model lacks, is an error;
            without, the former stays as it is and the latter is ignored.
        rename: Takes a name in the files, returns the name in the model; None drops the tensor.

    Returns:
        The names in the files that were not used: empty with ``strict``.

    Raises:
        ValueError: Something is missing, unexpected or of another shape, or a file is damaged.

    Example:
        >>> import tempfile, ds_zero
        >>> model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(ds_zero.save_safetensors(ds_zero.shard(model, None), folder))
        ...     print(ds_zero.load_safetensors(ds_zero.shard(other, None), folder))
        ['model.safetensors']
        []
        >>> torch.equal(model.weight, other.weight)
        True
    """
    with TensorFiles(path) as files:
        buffers = state.persistent_buffers(sharded.module)
        known = dict.fromkeys(buffers, "buffer")
        known |= {name: "param" for name, _ in sharded.module.named_parameters()}
        source = _Files(files, known, state.aliases(sharded.module), rename or str)
        if strict and source.unused:
            shown = ", ".join(map(repr, source.unused[:_MAX_SHOWN]))
            more = f" and {len(source.unused) - _MAX_SHOWN} more" if len(source.unused) > _MAX_SHOWN else ""
            raise ValueError(
                f"{path} holds tensors that the model has not: {shown}{more}; nothing was changed. Map the names with "
                "rename, or ignore them with strict=False"
            )
        sharded.load_state(source, optimizer=False, strict=strict)
        return source.unused


def save_safetensors(
    sharded: Sharded,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write parameters and buffers as Hugging Face does, one tensor after the other; all ranks call it.

    One file ``model.safetensors``, or several and an index. Rank 0 writes; other ranks need not see the folder. Files
    have temporary names until all are written; the index is renamed last. Memory: one whole tensor on each rank.
    A tied parameter is stored once, under its first name; the headers' metadata map its further names to that.

    Args:
        sharded: The model.
        folder: Created where it does not exist.
        dtype: Of floating-point parameters in the files; None: their exact values, float32 for what is trained.
            Buffers keep theirs.
        max_shard_bytes: Most bytes of tensors in one file; a larger tensor has a file of its own.

    Returns:
        The names of the files with tensors.

    Raises:
        ValueError: The format has no name for a tensor's data type; or, on rank 0, the folder holds files of these
            names: nothing is overwritten.
        OSError: On rank 0: a file could not be written; all that this call has written is removed.
        RuntimeError: On the other ranks, when rank 0 raises anything.
    """
    comm = sharded.access.comm
    buffers = state.persistent_buffers(sharded.module)
    tensors = [
        Planned(name, dtype if dtype is not None and exact.is_floating_point else exact, shape)
        for name, shape, exact in sharded.access.stored()
    ]
    tensors += [Planned(name, buffer.dtype, buffer.shape) for name, buffer in buffers.items()]
    tied = {further: str(name) for further, name in state.aliases(sharded.module).items()}
    writer = SafetensorsWriter(Path(folder), split(tensors, max_shard_bytes), tied)
    on_rank_0 = comm.rank == 0
    device = next((param.device for param in sharded.module.parameters()), torch.device("cpu"))
    _together(writer.begin() if on_rank_0 else None, comm, device)
    error = None
    for _, values in chain(sharded.access.stream(), buffers.items()):
        if on_rank_0 and error is None:  # after an error the others still wait to give their parts
            error = writer.write(values.detach())
    _together(error or (writer.finish() if on_rank_0 else None), comm, device)
    return writer.names


def _together(error: Exception | None, comm: Collectives, device: torch.device) -> None:
    """Raise on all ranks if there is an error on rank 0."""
    failed = agreed([error is not None], comm, device)[0][0]
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("rank 0 could not write the files; its own error says why. Nothing of them is left")


class _Files:
    """Plays the role ``StateSource``.

    Args:
        files: What to read.
        known: Role of each tensor of the model.
        aliases: Name under which the model lists a tied parameter, by its further names.
        rename: From names in the files to names in the model.
    """

    def __init__(
        self,
        files: TensorFiles,
        known: Mapping[str, str],
        aliases: Mapping[str, Json],
        rename: Callable[[str], str | None],
    ) -> None:
        self._files = files
        self._known = known
        self._names: dict[str, str] = {}  # in the files, by name in the model
        self.unused: list[str] = []
        for name in files.stored:
            renamed = rename(name)
            target = str(aliases.get(renamed, renamed)) if renamed is not None else None
            if target is None:
                continue
            if target not in known:
                self.unused.append(name)
                continue
            other = self._names.setdefault(target, name)
            if other != name:
                self._choose(target, renamed == target, name, other)

    @property
    def roles(self) -> list[str]:
        """Roles of which there may be tensors."""
        return ["param", "buffer"]

    @property
    def scalars(self) -> dict[str, Json]:
        """None: files hold tensors only."""
        return {}

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        """Return the shape of every tensor of one role, by name."""
        of_role = {target: name for target, name in self._names.items() if self._known[target] == role}
        return {target: self._files.stored[name].shape for target, name in of_role.items()}

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1D) with elements ``start ...`` of tensor ``name``."""
        del role
        self._files.read(self._names[name], start, out)

    def _choose(self, target: str, is_first: bool, name: str, other: str) -> None:  # noqa: FBT001 - private
        """Two tensors of the files are one in the model: tied there, and stored twice."""
        one, two = self._files.stored[name], self._files.stored[other]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            raise ValueError(
                f"{name!r} and {other!r} of the files are one parameter of the model, {target!r}, but have shapes "
                f"{list(one.shape)} and {list(two.shape)}; nothing was changed"
            )
        if is_first:
            self._names[target] = name
