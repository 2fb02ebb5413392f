"""Saving: all ranks write a draft, rank 0 checks that it is whole and publishes it by renaming.

[Note: Order of a save]
Each step is on the disk before the next begins, so a save that ends anywhere leaves no new checkpoint, or a
whole one. See [Note: A directory of checkpoints] for the names.
shard files -> draft folder -> every rank tells rank 0 what it wrote -> manifest -> draft folder
-> next ``latest`` -> directory -> rename the draft -> directory -> rename the next ``latest`` -> directory.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .._control import Control, together
from .._log import logger
from .assemble import assemble
from .container import require_little_endian
from .filesystem import LOCAL_FILESYSTEM, Filesystem, write_file
from .layout import LATEST, MANIFEST, Draft, check_tag, leftovers, read_latest
from .lock import DirectoryLock
from .manifest import Manifest, canonical, decode_share, encode_manifest, encode_share
from .shards import SaveConfig, write_share

if TYPE_CHECKING:
    from ..protocols import Json, PartState

_DEFAULT_CONFIG: Final = SaveConfig()


def save(
    directory: str | os.PathLike[str],
    tag: str,
    *,
    state: PartState,
    run: Mapping[str, Json],
    control: Control,
    config: SaveConfig = _DEFAULT_CONFIG,
    filesystem: Filesystem = LOCAL_FILESYSTEM,
) -> Path:
    """Write a checkpoint and publish it in one step; all ranks call it.

    Every rank writes its own pieces, straight from the memory they live in, and hashes them. The checkpoint
    appears under its name only when it is whole and on the disk; until then, and if anything fails, the older
    checkpoints are as they were. Drafts of killed saves are removed after a successful one.

    Args:
        directory: Holds one folder per checkpoint; made if needed. All ranks must see the same one.
        tag: Name of the folder, see :func:`default_tag`.
        state: This rank's pieces of the model and its optimizer.
        run: State of the training run (step, schedulers, ...); rank 0's is saved.
        control: The ranks.
        config: Sizes of files and pieces.
        filesystem: How the disk is changed.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: The tag exists, or cannot name a folder.
        RankError: It failed on at least one of several ranks; the text names ranks and errors. A process that works
            alone raises the error itself.

    Example:
        >>> import tempfile, torch
        >>> from types import SimpleNamespace
        >>> from ds_core._control import SingleControl
        >>> shape = torch.Size([2, 2])
        >>> piece = SimpleNamespace(name="w", role="param", shape=shape, start=0, data=torch.arange(4.0))
        >>> state = SimpleNamespace(pieces=[piece], shapes={"w": shape}, scalars={})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, "global_step7", state=state, run={"step": 7}, control=SingleControl())
        ...     sorted(file.name for file in path.iterdir())
        ['manifest.json', 'shard-00000-00.safetensors']
    """
    check_tag(tag)
    require_little_endian()
    root = Path(directory)
    is_leader = control.rank == 0
    with contextlib.ExitStack() as held:
        lock: DirectoryLock | None = None
        draft_id: Json = None
        with together(control):
            if is_leader:
                _make_directory(root, filesystem)
                lock = held.enter_context(DirectoryLock(root))
                draft_id = _begin(root, tag, filesystem)
        draft_id = control.broadcast(draft_id)
        if draft_id is None:
            raise ValueError(
                f"{root / tag} exists, and checkpoints are never overwritten: "
                f"save under another tag or into another directory, or remove the folder first"
            )
        draft = Draft(root, tag, str(draft_id))
        try:
            _write(draft, state, run, control=control, config=config, filesystem=filesystem)
        except Exception:
            if is_leader:
                _discard(draft, filesystem)
            raise
        if lock is not None:
            _remove_leftovers(root, lock, filesystem)
    return draft.published


def _make_directory(directory: Path, filesystem: Filesystem) -> None:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        filesystem.make_folder(path)
        filesystem.sync_folder(path.parent)


def _begin(directory: Path, tag: str, filesystem: Filesystem) -> str | None:
    """Make the draft's folder and return its id, or None if the tag is taken."""
    draft = Draft(directory, tag, uuid.uuid4().hex[:12])
    if os.path.lexists(draft.published):
        return None
    filesystem.make_folder(draft.folder)
    return draft.id


def _write(
    draft: Draft,
    state: PartState,
    run: Mapping[str, Json],
    *,
    control: Control,
    config: SaveConfig,
    filesystem: Filesystem,
) -> None:
    with together(control):
        canonical(run)  # first: what is not JSON should fail before gigabytes are written
        share = encode_share(write_share(draft.folder, state, rank=control.rank, config=config, filesystem=filesystem))
    shares = control.gather(share)
    with together(control):
        if shares is not None:
            manifest = assemble(
                [decode_share(share) for share in shares],
                run=run,
                previous=read_latest(draft.directory),
                created_ns=time.time_ns(),
            )
            _publish(draft, manifest, filesystem)


def _publish(draft: Draft, manifest: Manifest, filesystem: Filesystem) -> None:
    """Finish the draft and rename it. See [Note: Order of a save]."""
    write_file(filesystem, draft.folder / MANIFEST, encode_manifest(manifest))
    filesystem.sync_folder(draft.folder)
    write_file(filesystem, draft.next_latest, f"{draft.tag}\n".encode())
    filesystem.sync_folder(draft.directory)
    filesystem.rename(draft.folder, draft.published)
    try:
        filesystem.sync_folder(draft.directory)
        filesystem.rename(draft.next_latest, draft.directory / LATEST)
        filesystem.sync_folder(draft.directory)
    except OSError as error:
        raise RuntimeError(
            f"{draft.published} is whole and can be loaded, but making {LATEST!r} name it failed: {error}"
        ) from error


def _discard(draft: Draft, filesystem: Filesystem) -> None:
    """Remove a draft that failed, unless it was published before the failure."""
    if not draft.folder.exists():
        return
    # The error that brought us here matters more; what stays is removed after the next save.
    with contextlib.suppress(OSError):
        filesystem.remove(draft.folder)
        filesystem.remove(draft.next_latest)


def _remove_leftovers(directory: Path, lock: DirectoryLock, filesystem: Filesystem) -> None:
    try:
        found = leftovers(directory)
        if not found or not lock.take_alone():
            return
        for path in found:
            filesystem.remove(path)
            logger.info("removed %s, left by a save that was killed", path)
    except OSError as error:
        # The new checkpoint is published: a leftover is no reason to call its save failed.
        logger.warning("leftovers of killed saves stay in %s: %s", directory, error)
