"""What the steps of a pipeline cost: seconds and bytes, given or measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .instruction import Instruction, Op, Value


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Times and sizes by stage; the unit of time is the caller's.

    Example:
        >>> costs = Costs.uniform(4, forward=1.0, input_grad=1.0, weight_grad=1.0)
        >>> costs.num_stages, costs.message_seconds(Value("x", 1, 0))
        (4, 0.0)
    """

    forward: tuple[float, ...]
    """Time of F of each stage."""
    input_grad: tuple[float, ...]
    """Time of I of each stage."""
    weight_grad: tuple[float, ...]
    """Time of W of each stage."""
    kept_bytes: tuple[float, ...]
    """What F of each stage keeps of one micro-batch."""
    message_bytes: tuple[float, ...]
    """The input of each stage, and so the gradient of the output of the stage before; the first is not sent."""
    latency: float = 0.0
    """Time of a message of no bytes."""
    bytes_per_second: float = float("inf")
    """Speed of a link between two ranks, in each direction."""
    backward: tuple[float, ...] = ()
    """Time of B of each stage, where it is known; none: B takes as long as I and W."""
    held_bytes: tuple[float, ...] = ()
    """What each stage has throughout: weights, their gradients, the optimizer's state; none: nobody asks."""
    unshard: float = 0.0
    """Time of gathering the parameters of a stage."""
    reduce: float = 0.0
    """Time of summing the gradients of a stage."""
    skip_bytes: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Each skip, by name, and so its gradient; one that is not there weighs nothing."""

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in ("forward", "input_grad", "weight_grad", "kept_bytes")}
        lengths |= {len(each) for each in (self.backward, self.held_bytes) if each}
        if lengths != {len(self.message_bytes)}:
            raise ValueError(f"every tuple needs one number for each stage; got lengths {sorted(lengths)}")
        if self.latency < 0 or not self.bytes_per_second > 0:
            raise ValueError(f"latency >= 0 and bytes_per_second > 0; got {self.latency}, {self.bytes_per_second}")

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward: float = 1.0,
        input_grad: float = 1.0,
        weight_grad: float = 1.0,
        latency: float = 0.0,
    ) -> Costs:
        """Return costs of ``num_stages`` equal stages; one micro-batch at one stage counts as one byte."""
        each = num_stages * (1.0,)
        return cls(
            forward=num_stages * (forward,),
            input_grad=num_stages * (input_grad,),
            weight_grad=num_stages * (weight_grad,),
            kept_bytes=each,
            message_bytes=num_stages * (0.0,),
            latency=latency,
        )

    @property
    def num_stages(self) -> int:
        """Stages that have a price."""
        return len(self.forward)

    def seconds(self, instruction: Instruction) -> float:
        """Return how long a rank is busy with ``instruction``; messages travel by themselves."""
        stage = instruction.stage
        if instruction.op is Op.F:
            return self.forward[stage]
        if instruction.op is Op.I:
            return self.input_grad[stage]
        if instruction.op is Op.W:
            return self.weight_grad[stage]
        if instruction.op is Op.B:
            return self.backward[stage] if self.backward else self.input_grad[stage] + self.weight_grad[stage]
        return {Op.UNSHARD: self.unshard, Op.REDUCE: self.reduce}.get(instruction.op, 0.0)

    def nbytes(self, value: Value) -> float:
        """Return the size of a value."""
        if value.name:
            return self.skip_bytes.get(value.name, 0.0)
        if value.kind == "y":
            return self.kept_bytes[value.stage]
        if value.kind == "x":
            return self.message_bytes[value.stage]
        # the gradient of a stage's output is as large as the next one's input; what I leaves for W, too
        return self.message_bytes[min(value.stage + 1, self.num_stages - 1)]

    def message_seconds(self, value: Value) -> float:
        """Return how long a message takes from one rank to another."""
        return self.latency + self.nbytes(value) / self.bytes_per_second
