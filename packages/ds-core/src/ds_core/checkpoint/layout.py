"""Names inside a directory of checkpoints, and which tags are published there.

[Note: A directory of checkpoints]
``<tag>/``           a published checkpoint: ``manifest.json``, ``shard-RRRRR-KK.safetensors`` (rank, part).
``latest``           text: the tag published last.
``.tmp-<tag>-<id>/`` the *draft* of a checkpoint; renaming it to ``<tag>`` publishes it.
``.latest-<id>``     the next contents of ``latest``, written before the draft is renamed. If it is found and
                     its tag is published, the save of that tag ended between the two renames.
``.lock``            held by every running save; drafts found while nobody else holds it are leftovers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

MANIFEST: Final = "manifest.json"
LATEST: Final = "latest"
LOCK: Final = ".lock"
_DRAFT_PREFIX: Final = ".tmp-"
_NEXT_LATEST_PREFIX: Final = f".{LATEST}-"


class Draft(NamedTuple):
    """A checkpoint that is being written. See [Note: A directory of checkpoints]."""

    directory: Path
    tag: str
    id: str  # drawn by rank 0 for this save

    @property
    def folder(self) -> Path:
        """Where all ranks write."""
        return self.directory / f"{_DRAFT_PREFIX}{self.tag}-{self.id}"

    @property
    def next_latest(self) -> Path:
        """What ``latest`` will be."""
        return self.directory / f"{_NEXT_LATEST_PREFIX}{self.id}"

    @property
    def published(self) -> Path:
        """What the folder will be called."""
        return self.directory / self.tag


def default_tag(step: int) -> str:
    """Return the tag of optimizer step ``step``: the name that Hugging Face's resume looks for.

    Example:
        >>> default_tag(123)
        'global_step123'
    """
    return f"global_step{step}"


def check_tag(tag: str) -> None:
    """Raise :class:`ValueError` unless ``tag`` can name a checkpoint's folder.

    Example:
        >>> check_tag("runs/a")
        Traceback (most recent call last):
        ...
        ValueError: a tag names one folder: not empty, no '/', no '.' at the start, not 'latest'; got 'runs/a'
    """
    if not tag or "/" in tag or "\0" in tag or tag.startswith(".") or tag == LATEST:
        raise ValueError(f"a tag names one folder: not empty, no '/', no '.' at the start, not {LATEST!r}; got {tag!r}")


def shard_name(rank: int, part: int) -> str:
    """Return the file name of one part of what ``rank`` wrote."""
    return f"shard-{rank:05d}-{part:02d}.safetensors"


def published_tags(directory: Path) -> list[str]:
    """Return the names of the folders in ``directory`` that hold a manifest, sorted."""
    if not directory.is_dir():
        return []
    return sorted(
        folder.name
        for folder in directory.iterdir()
        if not folder.name.startswith(".") and (folder / MANIFEST).is_file()
    )


def read_latest(directory: Path) -> str | None:
    """Return the tag that ``latest`` names, or None if there is no such file."""
    return _read_tag(directory / LATEST)


def unannounced_tags(directory: Path) -> list[str]:
    """Return the tags of all drafts whose save wrote what ``latest`` should become, but did not rename it."""
    found = [_read_tag(path) for path in directory.glob(f"{_NEXT_LATEST_PREFIX}*")]
    return sorted({tag for tag in found if tag is not None})


def leftovers(directory: Path) -> list[Path]:
    """Return everything in ``directory`` that belongs to a save which has not ended, or never will."""
    return sorted(path for path in directory.iterdir() if path.name.startswith((_DRAFT_PREFIX, _NEXT_LATEST_PREFIX)))


def _read_tag(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
