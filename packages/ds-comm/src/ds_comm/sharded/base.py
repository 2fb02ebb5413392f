"""What the sharded optimizers share: flat buffers that are whole for a moment, state that is sharded.

[Note: Sharded 1-bit optimizers]
They play the role ``ExchangingOptimizer`` (see [Note: Own gradients] in ds-core). In the warm-up the partitioner adds
gradients exactly, each rank updates moments and weights of its shard, and weights are gathered. Later ranks exchange
codes, two collectives for each buffer, and all update the whole weights by what they decoded: to the same bits, so
that no weights travel.

What is kept is sharded: ``exp_avg``, ``exp_avg_sq``, what the servers owe, and exact weights where ranks compute with
others. What all need of it whole is derived. The momentum is the payloads that came last, decoded once more; the frozen
variance is gathered once, as the denominator it has become. After the warm-up, after loading, and when state is written
from outside, both are gathered from the shards, exactly.

The first element that a rank serves is the first of its shard, so blocks are cut as shards are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..optim.agreement import compare, settings_of
from ..optim.base import check_settings
from ..traffic import Traffic
from .all_reduce import ShardedAllReduce

if TYPE_CHECKING:
    from ds_core.exchange_protocols import WholeFlat
    from ds_core.protocols import Collectives

    from ..codec import Codec


class Joined:
    """A buffer and what belongs to it.

    Args:
        flat: The buffer.
        comm: The ranks.
        codec: Codes its messages.
        traffic: Where bytes are counted.
    """

    def __init__(self, flat: WholeFlat, comm: Collectives, codec: Codec, traffic: Traffic) -> None:
        self.flat = flat
        self._comm = comm
        self.reducer = ShardedAllReduce(comm, codec, flat, traffic=traffic)
        self.denominator = torch.zeros(flat.numel, device=flat.device)
        self.is_derived = False  # whether the denominator is that of the state

    def gather(self, states: Mapping[Tensor, Mapping[str, Any]], name: str, out: Tensor) -> None:
        """Fill ``out`` (1D) with the tensors ``name`` of all ranks' states; 4 bytes per element."""
        shard = torch.zeros(self.flat.numel // self._comm.size, device=self.flat.device)
        first = self._comm.rank * shard.numel()
        for start, param in self.flat.shards:
            shard[start - first : start - first + param.numel()] = states[param][name]
        self._comm.all_gather(out, shard, key=self.flat.key).wait()

    def scatter(self, states: Mapping[Tensor, Mapping[str, Any]], name: str, whole: Tensor) -> None:
        """Keep this rank's part of ``whole``."""
        for start, param in self.flat.shards:
            states[param][name].copy_(whole[start : start + param.numel()])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.reducer.nbytes + self.denominator.nbytes


class ShardedOptimizer(torch.optim.Optimizer):
    """Plays the role ``ExchangingOptimizer``; see [Note: Sharded 1-bit optimizers].

    Subclasses say what a step of the warm-up does to a shard, and what a later one does to a whole buffer.

    Args:
        params: Parameters, or parameter groups: shards, or parts of tensors in shards.
        defaults: Settings of groups.
        codec: Codes the messages.
        freeze_step: Last step of the warm-up.
    """

    counters: ClassVar[Mapping[str, float]] = {"step": 0}
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: ParamsT, defaults: dict[str, Any], codec: Codec, freeze_step: int) -> None:
        check_settings(defaults)
        self._codec = codec
        self.freeze_step = freeze_step
        self.traffic = Traffic()  # bytes of the messages of step_own; others are the partitioner's
        self._joined: list[Joined] = []
        self._message = torch.empty(0)  # 1D, float32, as long as the longest buffer
        self._owes = False  # whether anything was ever coded
        super().__init__(params, {**defaults, **self.counters, "exchanges": True})

    # Role ExchangingOptimizer #

    def join(self, comm: Collectives, flats: Sequence[WholeFlat]) -> None:
        """Exchange messages over ``comm`` from now on; called once, before the first step.

        Raises:
            ValueError: On all ranks: their codes or settings differ; those of groups the partitioner compares.
        """
        if flats and flats[0].device.type != "meta":
            step = f"a step of {type(self).__name__}"
            compare([step, *settings_of(self), f"codes: {self._codec.meaning}"], comm.gather_rows, flats[0].device)
        self._joined = [Joined(flat, comm, self._codec, self.traffic) for flat in flats]
        if flats:
            self._message = torch.zeros(max(flat.numel for flat in flats), device=flats[0].device)

    @property
    def wants_own(self) -> bool:
        """Whether the next step is :meth:`step_own`, not ``step``."""
        return self.count("step") >= self.freeze_step

    @torch.no_grad()
    def step_own(self, scale: float) -> None:
        """Step once with each rank's own gradient times ``scale``. All ranks call it; gradients are finite."""
        for each in self._joined:
            self.ensure_derived(each)
        self.exchange(lambda each, message: self.load_message(each, message, scale), self.take_mean)
        self.set_counts(step=self.count("step") + 1)

    def forget_whole(self) -> None:
        """Derive anew what was derived from shards of the state: they were written from outside."""
        for each in self._joined:
            each.is_derived = each.reducer.has_last = False

    def owed(self) -> dict[int, Tensor]:
        """Return by key this rank's shard (1D, float32) of what all ranks have yet to send. All ranks call it."""
        return {each.flat.key: each.reducer.owed() for each in self._joined} if self._owes else {}

    @torch.no_grad()
    def load_owed(self, owed: Mapping[int, Tensor]) -> None:
        """Have yet to send what :meth:`owed` gave, on any number of ranks, and nothing else."""
        self._owes = bool(owed)
        for each in self._joined:
            each.reducer.load_owed(owed.get(each.flat.key))

    @property
    def whole_bytes(self) -> int:
        """Bytes held besides the tensors of ``state``."""
        return self._message.nbytes + sum(each.nbytes for each in self._joined)

    # What subclasses do #

    def load_message(self, each: Joined, message: Tensor, scale: float) -> None:
        """Write what is to be exchanged of a buffer into ``message`` (1D)."""
        raise NotImplementedError(f"{type(self).__name__} has to say what is exchanged")

    def take_mean(self, each: Joined, mean: Tensor) -> None:
        """Update weights and state of a buffer by what came of the messages; ``mean`` may be overwritten."""
        raise NotImplementedError(f"{type(self).__name__} has to say what the mean of messages is for")

    def derive(self, each: Joined) -> None:
        """Make what is derived from shards of the state."""
        raise NotImplementedError(f"{type(self).__name__} has to say what it derives")

    # Parts of a step #

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the shards with mean gradients, in the warm-up.

        Raises:
            RuntimeError: The warm-up is over.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.wants_own:
            raise RuntimeError(
                f"step {self.count('step') + 1} takes whole gradients, not shards of their mean, and the partitioner "
                "hands them over: call its step(), or the engine's"
            )
        step = self.count("step") + 1
        self.warm_up(step)
        self.set_counts(step=step)
        return loss

    def warm_up(self, step: int) -> None:
        """Do step number ``step`` on the shards."""
        raise NotImplementedError(f"{type(self).__name__} has to say what a step of the warm-up does")

    def exchange(self, load: Callable[[Joined, Tensor], None], take: Callable[[Joined, Tensor], None]) -> None:
        """Exchange a message for each buffer, which ``load`` writes, and hand the means to ``take``."""
        self._owes = True
        for each in self._joined:
            message = self._message[: each.flat.numel]
            load(each, message)
            if each.reducer.is_alone:
                take(each, message.add_(each.reducer.server_error))
                each.reducer.load_owed(None)
            else:
                each.reducer.send(message)
        others = [each for each in self._joined if not each.reducer.is_alone]
        for each in others:
            each.reducer.serve(self._message)
        for each in others:
            message = self._message[: each.flat.numel]
            each.reducer.receive(message)
            take(each, message)

    def count(self, name: str) -> int:
        """Return a counter."""
        return int(self.param_groups[0][name])

    def set_counts(self, **values: float) -> None:
        """Set counters."""
        for group in self.param_groups:
            group.update(values)

    def state_of(self, param: nn.Parameter) -> dict[str, Any]:
        """Return a parameter's state, made where there is none."""
        state: dict[str, Any] = self.state[param]
        for name in self.buffers:
            if name not in state:
                state[name] = torch.zeros_like(param, requires_grad=False)
        return state

    def ensure_derived(self, each: Joined) -> None:
        """Derive what is derived from shards of the state, unless it is."""
        if not each.is_derived:
            for _, param in each.flat.shards:
                self.state_of(param)
            self.derive(each)
            each.is_derived = True
