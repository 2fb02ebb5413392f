"""Weights of a partitioned model from and to safetensors files, without a whole copy of it anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import state
from .intervals import agreed
from .safetensors_io import SINGLE, Planned, SafetensorsWriter, TensorFiles, split
from .texts import shown

if TYPE_CHECKING:
    from ds_core.protocols import Collectives, Json

    from .access import Access
    from .sharded import Sharded


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
            raise ValueError(
                f"{path} holds tensors that the model has not: {shown(map(repr, source.unused))}; "
                "nothing was changed. Map the names with rename, or ignore them with strict=False"
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
    module, access = sharded.module, sharded.access
    buffers = state.persistent_buffers(module)
    tensors = [
        Planned(name, dtype if dtype is not None and exact.is_floating_point else exact, shape)
        for name, shape, exact in access.stored()
    ]
    tensors += [Planned(name, buffer.dtype, buffer.shape) for name, buffer in buffers.items()]
    writer = SafetensorsWriter(Path(folder), split(tensors, max_shard_bytes), _tied(module, tensors))
    _write(writer, _values(tensors, access, buffers), module, access.comm)
    return writer.names


class Weights:
    """Weights of a partitioned model, in the data types that it computes in. Found at ``sharded.weights``.

    Args:
        module: The partitioned model.
        access: To its parameters.

    Example:
        >>> import ds_zero
        >>> precision = ds_zero.Precision(compute=torch.bfloat16)
        >>> sharded = ds_zero.shard(nn.Linear(2, 1), torch.optim.AdamW, precision=precision)
        >>> {name: tensor.dtype for name, tensor in sharded.weights.state_dict().items()}
        {'weight': torch.bfloat16, 'bias': torch.bfloat16}
    """

    def __init__(self, module: nn.Module, access: Access) -> None:
        self._module = module
        self._access = access

    def save(self, folder: str | os.PathLike[str], *, name: str = SINGLE, frozen: bool = True) -> dict[str, int]:
        """Write parameters and buffers into one file, as :func:`save_safetensors` does; all ranks call it.

        Args:
            folder: Created where it does not exist.
            name: Of the file; ends with ``.safetensors``.
            frozen: Whether parameters that require no gradient are written, too.

        Returns:
            On all ranks, bytes in the file by name.

        Raises:
            ValueError: The name ends otherwise, or stands in a folder of its own; and as for :func:`save_safetensors`.
            OSError: As for :func:`save_safetensors`.
            RuntimeError: As for :func:`save_safetensors`.
        """
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(
                f"weights are written in the safetensors format, never pickled, to one file within {folder}: give a "
                f"file name that ends with .safetensors, got {name!r}"
            )
        buffers = state.persistent_buffers(self._module)
        tensors = self._planned(buffers, frozen=frozen)
        writer = SafetensorsWriter(Path(folder), [tensors], _tied(self._module, tensors), name)
        _write(writer, _values(tensors, self._access, buffers), self._module, self._access.comm)
        return {tensor.name: tensor.shape.numel() * tensor.dtype.itemsize for tensor in tensors}

    def state_dict(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Return copies of parameters and buffers in host memory on rank 0, an empty one elsewhere; all ranks call it.

        A tied parameter stands there under all of its names, as one tensor. Memory on other ranks: one whole tensor.

        Args:
            frozen: Whether parameters that require no gradient are among them.
        """
        buffers = state.persistent_buffers(self._module)
        tensors = self._planned(buffers, frozen=frozen)
        held: dict[str, Tensor] = {}
        for tensor, values in zip(tensors, _values(tensors, self._access, buffers), strict=True):
            if self._access.comm.rank == 0:
                held[tensor.name] = values.detach().to("cpu", tensor.dtype, copy=tensor.name in buffers)
        tied = _tied(self._module, tensors) if held else {}
        return held | {further: held[name] for further, name in tied.items()}

    def _planned(self, buffers: Mapping[str, Tensor], *, frozen: bool) -> list[Planned]:
        params = dict(self._module.named_parameters())
        tensors = [
            Planned(name, params[name].dtype, shape)
            for name, shape, _ in self._access.stored()
            if frozen or params[name].requires_grad
        ]
        return tensors + [Planned(name, buffer.dtype, buffer.shape) for name, buffer in buffers.items()]


def _values(tensors: Iterable[Planned], access: Access, buffers: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the tensors, whole and exact, one at a time; all ranks go through all of them."""
    for tensor in tensors:
        yield buffers[tensor.name] if tensor.name in buffers else access.full_param(tensor.name)


def _tied(module: nn.Module, tensors: Iterable[Planned]) -> dict[str, str]:
    """Return the further names of those tensors that have several, with the first one of each."""
    names = {tensor.name for tensor in tensors}
    return {further: str(name) for further, name in state.aliases(module).items() if name in names}


def _write(writer: SafetensorsWriter, values: Iterable[Tensor], module: nn.Module, comm: Collectives) -> None:
    """Write ``values`` on rank 0; all ranks raise if that fails."""
    on_rank_0 = comm.rank == 0
    device = next((param.device for param in module.parameters()), torch.device("cpu"))
    _together(writer.begin() if on_rank_0 else None, comm, device)
    error = None
    for each in values:
        if on_rank_0 and error is None:  # after an error the others still wait to give their parts
            error = writer.write(each.detach())
    _together(error or (writer.finish() if on_rank_0 else None), comm, device)


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
