"""What one rank does at one moment of a pipeline: an immutable record that reads and writes named values.

[Note: Values]
A *value* is a tensor, or several that travel together, of one micro-batch at one stage, named by its kind:

====== =====================================================================================================
kind   what it is
====== =====================================================================================================
x      the input of the stage; written by F of the stage before. Stage 0 reads its own data.
y      what F keeps for the backward pass
g      the gradient of the stage's output; written by B or I of the stage after. The last stage has its loss.
d      what I leaves for W
s      a skip into the stage; written by F of its source, or once a step by LEND. See [Note: Skips].
t      the gradient of a skip out of the stage; written by B or I of its target
====== =====================================================================================================

Every instruction says which values it needs and which it makes, so that whoever checks, times or runs a schedule needs
to know nothing else about it. A value is written once on each rank: by the instruction that computes it, or by RECV.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from .skips import NAME, Skip, entering, leaving


class Op(str, Enum):
    """What an instruction does."""

    F = "F"  # forward of one micro-batch through a stage
    B = "B"  # whole backward: gradients of input and weights
    I = "I"  # noqa: E741 - the literature's letter: gradient of the input only
    W = "W"  # gradient of the weights only; later than I
    SEND = "SEND"  # a value to another rank
    RECV = "RECV"  # a value from another rank
    UNSHARD = "UNSHARD"  # gather the stage's parameters
    RESHARD = "RESHARD"  # free what was gathered
    LEND = "LEND"  # hand out what is constant over the step
    RETURN = "RETURN"  # free what was lent
    REDUCE = "REDUCE"  # sum the stage's gradients over the data-parallel ranks
    OPT = "OPT"  # optimizer step of all stages of the rank


COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W})
"""Operations on one micro-batch at one stage."""

USES_WEIGHTS = COMPUTE | {Op.LEND}
"""Operations that need the stage's parameters."""


class Value(NamedTuple):
    """See [Note: Values]."""

    kind: str  # x, y, g, d, s or t
    stage: int
    micro_batch: int  # -1: all of the step
    name: str = ""  # of the skip (s, t)

    def __str__(self) -> str:
        which = f".{self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"{self.kind}{self.stage}{which}{self.name and ':'}{self.name}"


class Instruction(NamedTuple):
    """One step of one rank's program."""

    op: Op
    stage: int = -1  # -1: none (OPT)
    micro_batch: int = -1  # -1: none (UNSHARD, RESHARD, LEND, RETURN, REDUCE, OPT; messages of what is constant)
    peer: int = -1  # rank at the other end (SEND, RECV)
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    frees: tuple[Value, ...] = ()  # of what it reads, what nobody needs any more

    def __str__(self) -> str:
        if self.op is Op.SEND:
            return f"SEND:{self.reads[0]}>{self.peer}"
        if self.op is Op.RECV:
            return f"RECV:{self.writes[0]}<{self.peer}"
        if self.op is Op.OPT:
            return "OPT"
        return f"{self.op.value}{self.stage}" + (f".{self.micro_batch}" if self.micro_batch >= 0 else "")


def compute(
    op: Op, stage: int, micro_batch: int, *, num_stages: int, trains: bool = True, skips: Sequence[Skip] = ()
) -> Instruction:
    """Return an F, B, I or W.

    Args:
        op: Which.
        stage: 0 ... ``num_stages - 1``.
        micro_batch: From 0.
        num_stages: Of the whole pipeline.
        trains: Whether a backward pass follows, for which F keeps something.
        skips: Of the whole pipeline.

    Example:
        >>> instruction = compute(Op.F, 1, 3, num_stages=4)
        >>> [str(value) for value in instruction.reads], [str(value) for value in instruction.writes]
        (['x1.3'], ['y1.3', 'x2.3'])
    """
    kept, left = Value("y", stage, micro_batch), Value("d", stage, micro_batch)
    before: tuple[Value, ...] = (Value("x", stage, micro_batch),) if stage else ()
    after: tuple[Value, ...] = (Value("g", stage, micro_batch),) if stage < num_stages - 1 else ()
    if op is Op.W:
        return Instruction(op, stage, micro_batch, reads=(kept, left), frees=(kept, left))
    taken, given = entering(skips, stage), leaving(skips, stage)
    lent = tuple(Value("s", stage, -1, skip.name) for skip in taken if skip.constant)
    if op is Op.F:
        before += tuple(Value("s", stage, micro_batch, skip.name) for skip in taken if not skip.constant)
        handed = tuple(Value("s", skip.target, micro_batch, skip.name) for skip in given if not skip.constant)
        out = (Value("x", stage + 1, micro_batch),) if stage < num_stages - 1 else ()
        keeps = (kept,) if trains else ()
        return Instruction(op, stage, micro_batch, reads=before + lent, writes=keeps + out + handed, frees=before)
    after += tuple(Value("t", stage, micro_batch, skip.name) for skip in given)
    gradients: tuple[Value, ...] = (Value("g", stage - 1, micro_batch),) if stage else ()
    gradients += tuple(Value("t", skip.source, micro_batch, skip.name) for skip in taken)
    reads = (kept, *after, *lent)
    if op is Op.B:
        return Instruction(op, stage, micro_batch, reads=reads, writes=gradients, frees=(kept, *after))
    return Instruction(op, stage, micro_batch, reads=reads, writes=(left, *gradients), frees=after)


def send(value: Value, dst: int) -> Instruction:
    """Return a SEND of ``value`` to rank ``dst``."""
    return Instruction(Op.SEND, value.stage, value.micro_batch, dst, reads=(value,), frees=(value,))


def receive(value: Value, src: int) -> Instruction:
    """Return a RECV of ``value`` from rank ``src``."""
    return Instruction(Op.RECV, value.stage, value.micro_batch, src, writes=(value,))


def of_stage(op: Op, stage: int) -> Instruction:
    """Return an UNSHARD, RESHARD or REDUCE."""
    return Instruction(op, stage)


def lend(stage: int, skips: Sequence[Skip]) -> Instruction:
    """Return the LEND of ``stage``, which writes the constant skips that leave it."""
    lent = tuple(Value("s", skip.target, -1, skip.name) for skip in leaving(skips, stage) if skip.constant)
    return Instruction(Op.LEND, stage, writes=lent)


def give_back(stage: int, skips: Sequence[Skip]) -> Instruction:
    """Return the RETURN of ``stage``, which frees the constant skips that enter it."""
    lent = tuple(Value("s", stage, -1, skip.name) for skip in entering(skips, stage) if skip.constant)
    return Instruction(Op.RETURN, stage, reads=lent, frees=lent)


OPT = Instruction(Op.OPT)
"""The optimizer step."""

_MESSAGE = re.compile(rf"(SEND|RECV):(?:([xg])(\d+)\.(\d+)|([st])(\d+)(?:\.(\d+))?:({NAME}))([<>])(\d+)")
_OTHER = re.compile(r"([A-Z]+?)(\d+)(?:\.(\d+))?")


def parse(text: str, *, num_stages: int, trains: bool = True, skips: Sequence[Skip] = ()) -> Instruction:
    """Return the instruction that prints as ``text``.

    Raises:
        ValueError: None does.

    Example:
        >>> str(parse("SEND:x2.0>1", num_stages=4))
        'SEND:x2.0>1'
    """
    if text == "OPT":
        return OPT
    if match := _MESSAGE.fullmatch(text):
        op, *plain, kind, stage, micro_batch, name, arrow, peer = match.groups()
        if (op == "SEND") == (arrow == ">"):
            if name is None:
                value = Value(plain[0], int(plain[1]), int(plain[2]))
            else:
                value = Value(kind, int(stage), int(micro_batch or -1), name)
            return send(value, int(peer)) if op == "SEND" else receive(value, int(peer))
    elif (match := _OTHER.fullmatch(text)) and match[1] in Op.__members__:
        op_, stage_ = Op(match[1]), int(match[2])
        if op_ in COMPUTE and match[3] is not None:
            return compute(op_, stage_, int(match[3]), num_stages=num_stages, trains=trains, skips=skips)
        if op_ in (Op.LEND, Op.RETURN) and match[3] is None:
            return lend(stage_, skips) if op_ is Op.LEND else give_back(stage_, skips)
        if op_ in (Op.UNSHARD, Op.RESHARD, Op.REDUCE) and match[3] is None:
            return of_stage(op_, stage_)
    raise ValueError(
        f"{text!r} is no instruction; there are F1.0, B1.0, I1.0 and W1.0 (stage.micro-batch), SEND:x1.0>2 and "
        "RECV:g1.0<2 (value and rank; of a skip s1.0:name and t1.0:name, or s1:name if it is constant), UNSHARD1, "
        "RESHARD1, LEND1, RETURN1, REDUCE1 (stage) and OPT"
    )
