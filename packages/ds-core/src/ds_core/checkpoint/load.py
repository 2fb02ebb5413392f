"""Opening a checkpoint: which one to take, whether it fits a model, and reading it whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .._log import logger
from .folder import advice
from .layout import LATEST, MANIFEST, check_tag, published_tags, read_latest, unannounced_tags
from .problems import CheckpointError, listing
from .read import Checkpoint


def open_checkpoint(directory: str | os.PathLike[str], tag: str | None = None) -> Checkpoint:
    """Open a checkpoint after verifying its manifest and the presence and size of its files.

    Without a tag: the one that ``latest`` names, or a newer one whose save ended before it could renew
    ``latest``. If that does not verify, the newest that does; a warning says what was skipped and why.

    Args:
        directory: Holds one folder per checkpoint.
        tag: Which one; None takes the last good one.

    Returns:
        A source of state. It fits any number of ranks, whatever number wrote it.

    Raises:
        ValueError: There is no such tag.
        CheckpointError: The named checkpoint is damaged, or without a tag, there is none that is not.
    """
    root = Path(directory)
    if tag is not None:
        try:
            return _open_named(root, tag)
        except CheckpointError as error:
            raise CheckpointError(f"{error}\n{advice(root / tag)}") from None
    candidates = Candidates(root)
    checkpoint = candidates.next()
    candidates.report(checkpoint)
    return checkpoint


class Candidates:
    """The checkpoints of a directory, the one to take first; each is opened when it is asked for.

    Args:
        directory: Holds one folder per checkpoint.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._root = Path(directory)
        self._skipped: list[str] = []
        self._attempts = _attempts(self._root, self._skipped)

    def next(self) -> Checkpoint:
        """Return the next one whose manifest verifies, and whose files are there.

        Raises:
            CheckpointError: There is none left; the text says why each was passed over.
        """
        for checkpoint in self._attempts:
            return checkpoint
        raise CheckpointError(_why_none(self._root, self._skipped))

    def skip(self, checkpoint: Checkpoint, problems: Sequence[str]) -> None:
        """Note why the one that was returned last is not taken."""
        self._skipped.append(f"{checkpoint.tag} is damaged:\n{listing(problems)}")

    def report(self, checkpoint: Checkpoint) -> None:
        """Warn if others were passed over before ``checkpoint``."""
        if self._skipped:
            logger.warning("opening %s after skipping:\n%s", checkpoint.path, listing(self._skipped))


def check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], *, strict: bool = True) -> None:
    """Raise unless the checkpoint fits a model; call it before anything of the model is changed.

    Args:
        checkpoint: What is to be loaded.
        shapes: Shape of every parameter and buffer of the model, by name.
        strict: Whether tensors that only one side has are errors; a shape that differs always is.

    Raises:
        ValueError: It does not fit; the text lists the tensors.

    Example:
        >>> import tempfile, torch
        >>> from types import SimpleNamespace
        >>> from ds_core._control import SingleControl
        >>> from ds_core.checkpoint import save
        >>> shape = torch.Size([2])
        >>> piece = SimpleNamespace(name="w", role="param", shape=shape, start=0, data=torch.zeros(2))
        >>> state = SimpleNamespace(pieces=[piece], shapes={"w": shape}, scalars={})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, "a", state=state, run={}, control=SingleControl())
        ...     check_shapes(open_checkpoint(folder), {"w": torch.Size([3])})
        Traceback (most recent call last):
        ...
        ValueError: checkpoint 'a' does not fit the model:
          w: the checkpoint has shape [2], the model [3]
    """
    saved = checkpoint.shapes
    problems = [
        f"{name}: the checkpoint has shape {list(saved[name])}, the model {list(shape)}"
        for name, shape in shapes.items()
        if name in saved and saved[name] != shape
    ]
    if strict:
        problems += [
            f"{name}: not in the checkpoint, the model has shape {list(shape)}"
            for name, shape in shapes.items()
            if name not in saved
        ]
        problems += [
            f"{name}: not in the model, the checkpoint has shape {list(shape)}"
            for name, shape in saved.items()
            if name not in shapes
        ]
    if problems:
        raise ValueError(f"checkpoint {checkpoint.tag!r} does not fit the model:\n{listing(problems)}")


def load_full(path: str | os.PathLike[str], role: str = "param") -> dict[str, Tensor]:
    """Read whole tensors in one process, without any process group; every byte is verified.

    Args:
        path: A checkpoint's folder, or a directory of checkpoints, meaning its last good one.
        role: ``param``, ``buffer`` or the optimizer's own name of it.

    Returns:
        The tensors in their saved shapes and data types, by name, in CPU memory; a tied parameter under each of its
        names, as one tensor; a parameter without elements, of which no rank had a piece, as float32.

    Raises:
        ValueError: The checkpoint has no such role.
        CheckpointError: It is damaged, or there is none.

    Example:
        >>> import tempfile, torch
        >>> from types import SimpleNamespace
        >>> from ds_core._control import SingleControl
        >>> from ds_core.checkpoint import save
        >>> shape = torch.Size([2, 2])
        >>> piece = SimpleNamespace(name="w", role="param", shape=shape, start=0, data=torch.arange(4.0))
        >>> state = SimpleNamespace(pieces=[piece], shapes={"w": shape}, scalars={})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, "a", state=state, run={}, control=SingleControl())
        ...     load_full(folder)
        {'w': tensor([[0., 1.],
                [2., 3.]])}
    """
    folder = Path(path).resolve()
    is_tag = (folder / MANIFEST).is_file()
    checkpoint = open_checkpoint(folder.parent, folder.name) if is_tag else open_checkpoint(folder)
    tensors = {}
    for name, shape in checkpoint.shapes_of(role).items():
        flat = torch.empty(shape.numel(), dtype=checkpoint.dtype(role, name))
        checkpoint.read(role, name, 0, flat)
        tensors[name] = flat.view(shape)
    aliases = cast("Mapping[str, str]", checkpoint.scalars.get("aliases", {}))
    return tensors | {alias: tensors[name] for alias, name in aliases.items() if name in tensors}


def _open_named(root: Path, tag: str) -> Checkpoint:
    check_tag(tag)
    folder = root / tag
    if not root.is_dir():
        raise ValueError(f"there is no folder {root.absolute()}, so no checkpoint {tag!r} in it")
    if not folder.is_dir():
        tags = published_tags(root)
        raise ValueError(f"there is no checkpoint {tag!r} in {root}; there are: {', '.join(tags) or 'none'}")
    return Checkpoint(folder)


def _why_none(root: Path, skipped: Sequence[str]) -> str:
    """Say why no checkpoint can be opened: there is nothing to open, or what there was does not verify."""
    if not root.is_dir():
        return f"no checkpoint can be opened: there is no folder {root.absolute()}"
    if (root / MANIFEST).is_file():
        return (
            f"no checkpoint can be opened in {root}, because it is one itself: name the folder that holds it, "
            f"{root.absolute().parent}, and the tag {root.absolute().name!r}"
        )
    if read_latest(root) is None and not published_tags(root):
        return f"no checkpoint can be opened in {root}: nothing was saved there, it holds no folder with a {MANIFEST}"
    return f"no checkpoint can be opened in {root}; found were:\n{listing(skipped)}"


def _attempts(root: Path, skipped: list[str]) -> Iterator[Checkpoint]:
    """Yield checkpoints, best first; add a line to ``skipped`` for each that was passed over."""
    latest = read_latest(root)
    # See [Note: A directory of checkpoints]: published, but the rename of ``latest`` did not happen. Only if
    # ``latest`` is still what it was then: otherwise a later save, or a person, has decided.
    unannounced = [
        checkpoint for checkpoint in _open_all(root, unannounced_tags(root), []) if checkpoint.previous == latest
    ]
    if unannounced:
        skipped.append(
            f"{LATEST!r} names {latest}: a newer checkpoint was saved, but the save ended before renewing it"
        )
        yield from _newest_first(unannounced)
    if latest is None:
        skipped.append(f"there is no file {LATEST!r}")
    else:
        yield from _open_all(root, [latest], skipped)
    tried = {latest, *(checkpoint.tag for checkpoint in unannounced)}
    others = [tag for tag in published_tags(root) if tag not in tried]
    yield from _newest_first(_open_all(root, others, skipped))


def _open_all(root: Path, tags: list[str], skipped: list[str]) -> Iterator[Checkpoint]:
    for tag in tags:
        try:
            yield _open_named(root, tag)
        except (CheckpointError, ValueError) as error:
            skipped.append(f"{tag}: {error}")


def _newest_first(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.created_ns, reverse=True)
