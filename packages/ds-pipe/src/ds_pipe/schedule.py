"""A schedule: for each rank the list of what it does, which prints and parses back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from .instruction import Instruction, Op, parse
from .skips import Skip, checked, parse_skips

Row: TypeAlias = "tuple[Instruction, ...]"

_HEADER = "schedule"
_WIDTH = 8  # of a cell in the grid


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What every rank of a pipeline does in one step, communication included.

    Text: a header, then one line per rank; whoever writes one by hand has it checked by ``validate``.

    Example:
        >>> text = '''schedule hand placement 0,1 micro_batches 1
        ... 0: F0.0 SEND:x1.0>1 RECV:g0.0<1 B0.0 REDUCE0 OPT
        ... 1: RECV:x1.0<0 F1.0 B1.0 SEND:g0.0>0 REDUCE1 OPT'''
        >>> schedule = Schedule.parse(text)
        >>> schedule.num_stages, str(schedule) == text
        (2, True)
    """

    name: str
    """What it is called; no blanks."""
    placement: tuple[int, ...]
    """The rank of each stage."""
    num_micro_batches: int
    """Micro-batches in a step."""
    rows: tuple[Row, ...]
    """By rank, what it does, in order."""
    trains: bool = True
    """Whether there are backward passes."""
    skips: tuple[Skip, ...] = ()
    """What goes past stages; see [Note: Skips]."""

    def __post_init__(self) -> None:
        checked(self.skips, len(self.placement))

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.rows)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages on ``rank``, in order."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def __str__(self) -> str:
        header = (
            f"{_HEADER} {self.name} placement {','.join(map(str, self.placement))} "
            f"micro_batches {self.num_micro_batches}{'' if self.trains else ' forward_only'}"
            f"{' skips ' if self.skips else ''}{','.join(map(str, self.skips))}"
        )
        lines = (" ".join([f"{rank}:", *map(str, row)]) for rank, row in enumerate(self.rows))
        return "\n".join([header, *lines])

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule that prints as ``text``; blank lines and lines that begin with ``#`` do not count.

        Raises:
            ValueError: The text is no schedule; says which line. Whether the schedule works is not looked at.
        """
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        head = _parse_header(lines[0] if lines else [])
        if [words[0] for words in lines[1:]] != [f"{rank}:" for rank in range(len(lines) - 1)]:
            raise ValueError(f"one line per rank has to follow, '0: ...', '1: ...'; got {[w[0] for w in lines[1:]]}")
        rows = []
        for rank, words in enumerate(lines[1:]):
            try:
                parsed = [
                    parse(word, num_stages=len(head.placement), trains=head.trains, skips=head.skips)
                    for word in words[1:]
                ]
            except ValueError as error:
                raise ValueError(f"rank {rank}: {error}") from error
            rows.append(tuple(parsed))
        return cls(rows=tuple(rows), **head._asdict())

    def grid(self, marks: Sequence[tuple[int, int]] = ()) -> str:
        """Draw the rows below each other, eight instructions a line; those at ``marks`` (rank, index) in brackets.

        With marks, only what lies around them is drawn.
        """
        return "\n".join(self._grid_lines(frozenset(marks)))

    def _grid_lines(self, marks: frozenset[tuple[int, int]]) -> Iterator[str]:
        for rank, row in enumerate(self.rows):
            at = [index for owner, index in marks if owner == rank]
            if marks and not at:
                continue
            first, last = (max(0, min(at) - _WIDTH), max(at) + _WIDTH) if at else (0, len(row))
            cells = [
                f"[{one}]" if (rank, index) in marks else str(one)
                for index, one in enumerate(row)
                if first <= index <= last
            ]
            yield f"rank {rank}: {'... ' if first else ''}{' '.join(cells)}{' ...' if last < len(row) - 1 else ''}"


def splits_backward(schedule: Schedule) -> bool:
    """Whether gradients of inputs and of weights are computed apart."""
    return any(one.op is Op.I for row in schedule.rows for one in row)


class _Header(NamedTuple):
    name: str
    placement: tuple[int, ...]
    num_micro_batches: int
    trains: bool
    skips: tuple[Skip, ...]


def _parse_header(words: list[str]) -> _Header:
    try:
        head, name, _, placement, _, micro_batches, *rest = words
        trains = rest[:1] != ["forward_only"]
        rest = rest if trains else rest[1:]
        if head != _HEADER or (rest and (rest[0] != "skips" or len(rest) != 2)):
            raise ValueError
        ranks, count = tuple(int(rank) for rank in placement.split(",")), int(micro_batches)
    except ValueError:
        raise ValueError(
            "the first line has to read 'schedule NAME placement RANK,RANK,... micro_batches COUNT [forward_only] "
            f"[skips STAGE>STAGE:NAME,...]'; got {' '.join(words)!r}"
        ) from None
    return _Header(name, ranks, count, trains, parse_skips(rest[1]) if rest else ())
