"""An open checkpoint: elements of its tensors, verified as they are read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .assemble import MODEL_ROLES
from .container import DTYPES, byte_view, require_little_endian
from .folder import advice, piece_problem, read_manifest, size_problems
from .manifest import PieceRecord, TensorRecord
from .pieces import Interval, intersect, touching
from .problems import CheckpointError, listing

if TYPE_CHECKING:
    from ..protocols import Json


class _Stored(NamedTuple):
    """One tensor and where its elements stand."""

    tensor: TensorRecord
    pieces: list[PieceRecord]  # by start, without gaps

    @property
    def numel(self) -> int:
        return prod(self.tensor.shape)


class Checkpoint:
    """A published checkpoint whose manifest verified and whose files are all there (protocols.StateSource).

    Holds no file open. Data is verified piece by piece when it is read, so that a rank which needs a fraction
    of the checkpoint reads little more than that fraction.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: The manifest does not verify, or a file is missing or has the wrong size.
    """

    def __init__(self, path: Path) -> None:
        require_little_endian()
        self._path = path
        self._manifest = read_manifest(path)
        problems = size_problems(path, self._manifest.files)
        if problems:
            raise CheckpointError(f"{path} is damaged:\n{listing(problems)}")
        pieces_of = defaultdict(list)
        for piece in sorted(self._manifest.pieces, key=lambda piece: piece.start):
            pieces_of[piece.tensor].append(piece)
        self._stored = {
            (tensor.role, tensor.name): _Stored(tensor, pieces_of[index])
            for index, tensor in enumerate(self._manifest.tensors)
        }

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with elements ``start ...`` of a tensor, converting the data type if needed.

        Every piece that it touches is read whole and verified before any element of it is copied.

        Args:
            role: ``param``, ``buffer`` or the optimizer's own name of it.
            name: Fully qualified name.
            start: First element, in the row-major flattened tensor.
            out: 1D, on any device.

        Raises:
            ValueError: There is no such tensor, or it has no such elements.
            CheckpointError: A piece is not what was written; the text names it.
        """
        stored = self._find(role, name)
        wanted = Interval(start, start + out.numel())
        if out.dim() != 1 or start < 0 or wanted.end > stored.numel:
            raise ValueError(
                f"{role}/{name} of shape {list(stored.tensor.shape)} has {stored.numel} elements; "
                f"got a request for {wanted}, into shape {list(out.shape)}: read an interval into a 1D tensor"
            )
        target = out.detach()
        pieces = list(touching(stored.pieces, wanted))
        longest = max((piece.end_byte - piece.start_byte for piece in pieces), default=0)
        buffer = torch.empty(longest, dtype=torch.uint8, pin_memory=out.is_cuda)
        for piece in pieces:
            raw = buffer[: piece.end_byte - piece.start_byte]
            self._fill(piece, raw)
            part = intersect(piece, wanted)
            elements = raw.view(DTYPES[stored.tensor.dtype])[part.start - piece.start : part.end - piece.start]
            target[part.start - start : part.end - start].copy_(elements)

    def dtype(self, role: str, name: str) -> torch.dtype:
        """Return the data type that a tensor was saved in."""
        return DTYPES[self._find(role, name).tensor.dtype]

    def shapes_of(self, role: str) -> dict[str, torch.Size]:
        """Return the shape of every tensor of one role, by name.

        Raises:
            ValueError: There is no such role.
        """
        if role not in self.roles:
            raise ValueError(f"{self._path} has the roles {', '.join(self.roles)}; got {role!r}")
        return {s.tensor.name: torch.Size(s.tensor.shape) for s in self._stored.values() if s.tensor.role == role}

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self._path

    @property
    def tag(self) -> str:
        """The folder's name."""
        return self._path.name

    @property
    def roles(self) -> Sequence[str]:
        """Roles present, sorted."""
        return sorted({role for role, _ in self._stored})

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter and buffer of the model, by name."""
        stored = [s.tensor for s in self._stored.values() if s.tensor.role in MODEL_ROLES]
        return {tensor.name: torch.Size(tensor.shape) for tensor in stored}

    @property
    def scalars(self) -> Mapping[str, Json]:
        """Hyperparameters and counters of the partitioned state, as saved."""
        return self._manifest.scalars

    @property
    def run(self) -> Mapping[str, Json]:
        """State of the training run, as saved."""
        return self._manifest.run

    @property
    def world_size(self) -> int:
        """How many ranks wrote it; any number can read it."""
        return self._manifest.world_size

    @property
    def created_ns(self) -> int:
        """When it was complete, in nanoseconds since 1970."""
        return self._manifest.created_ns

    @property
    def previous(self) -> str | None:
        """The tag that ``latest`` named when this one was written."""
        return self._manifest.previous

    def _find(self, role: str, name: str) -> _Stored:
        stored = self._stored.get((role, name))
        if stored is None:
            roles = [known for known in self.roles if (known, name) in self._stored]
            raise ValueError(
                f"{self._path} holds no {role!r} of {name!r}; of that name it holds {roles or 'nothing'}, "
                f"and its roles are {', '.join(self.roles)}"
            )
        return stored

    def _fill(self, piece: PieceRecord, raw: Tensor) -> None:
        problem = piece_problem(self._path, self._manifest, piece, byte_view(raw))
        if problem is not None:
            raise CheckpointError(f"{self._path} is damaged: {problem}; {advice(self._path, self.previous)}")
