"""The roles: what one part of the stack offers, so that another part can be built against it and swapped.

[Note: Roles]
A wheel other than ds-core imports this file under ``TYPE_CHECKING`` only; at run time it gets its collaborators
as arguments and has a plain torch default for each. So every role is structural (:class:`typing.Protocol`):
a class fits by having the right methods, not by inheriting. Calls go down, news comes up as return values. The roles of
kernels stand in ``kernel_protocols``, those by which users reach a model's values in ``access_protocols``.

[Note: Plugins]
An entry point in one of the groups of :data:`GROUPS` names a *plugin object*: ``role_version`` (compared with
:data:`ROLE_VERSIONS`), ``config_type`` (a frozen dataclass, or None) and ``build(config, context)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .access_protocols import Access, Parking, Weights
from .kernel_protocols import KernelBackend

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What may stand in a manifest or a scalar state: JSON values, so no pickle is ever needed."""

ParamGroups: TypeAlias = "list[dict[str, Any]]"
"""``torch.optim`` parameter groups: ``{"params": [...], "lr": ..., ...}``."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "ds.partitioner": ("ds-zero",),
    "ds.store": (),
    "ds.pipeline": ("ds-pipe",),
    "ds.tensor": ("ds-pipe",),
    "ds.collectives": ("ds-comm",),
    "ds.optimizer": ("ds-kernels", "ds-zero", "ds-comm"),
    "ds.attention": (),
    "ds.kernels": ("ds-kernels",),
    "ds.monitor": (),
}
"""Entry-point groups, each with the wheels of ours that offer plugins of it."""

ROLE_VERSIONS: Mapping[str, int] = {**dict.fromkeys(GROUPS, 1), "ds.partitioner": 2, "ds.pipeline": 2}
"""The version of each role that this ds-core speaks: one more whenever what an object has to offer grows or changes."""


# Plugins #


class Plugin(Protocol):
    """What an entry point must name."""

    @property
    def role_version(self) -> int:
        """Version of the role the plugin was written for."""

    @property
    def config_type(self) -> type | None:
        """Frozen dataclass of the plugin's own settings, or None when it has none."""

    def build(self, config: Any, context: BuildContext) -> Any:
        """Return the object that plays the role."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildContext:
    """What the composition root knows when it builds a plugin."""

    device: torch.device
    """Where parameters live."""
    compute_dtype: torch.dtype | None = None
    """Data type of forward and backward; None leaves the model's own."""
    group: dist.ProcessGroup | None = None
    """Ranks that share the work; None for a single process."""
    kernels: KernelBackend | None = None
    """Fused kernels, or None for the plugin's torch default."""
    compression: Compression | None = None
    """What is put around the collectives of weights and gradients; None: nothing."""
    gradient_dtype: torch.dtype = torch.float32
    """Data type in which summed gradients are kept until the step."""
    keep_fp32: tuple[str, ...] = ()
    """Classes, or parts of qualified names, of modules that stay in float32 under a lower ``compute_dtype``."""
    accumulation: int = 1
    """Micro-batches of an optimizer step on one rank."""
    partial: bool = False
    """Whether models are stages of a larger one: modules that settings name may be in another stage."""


# Communication #


class Handle(Protocol):
    """Something that was started and has to be waited for."""

    def wait(self) -> None:
        """Return when the result may be read and the inputs may be written."""


class Collectives(Protocol):
    """Communication of one group of ranks.

    ``key`` names the buffer, the same on every rank; calls with different keys may be in flight together and
    need not be issued in one order on all ranks.
    """

    @property
    def rank(self) -> int:
        """This process's index in the group."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    def allocate(self, numel: int, like: Tensor) -> Tensor:
        """Return 1D memory of ``like``'s data type and device, arbitrary contents, for data that will be sent."""

    def all_gather(self, out: Tensor, shard: Tensor, *, key: int) -> Handle:
        """Fill ``out`` (1D, ``size * n``) with every rank's ``shard`` (1D, ``n``), in rank order."""

    def reduce_scatter(self, out: Tensor, full: Tensor, *, key: int) -> Handle:
        """Sum slice ``rank`` of every rank's ``full`` (1D, ``size * n``) into ``out`` (1D, ``n``, may be wider)."""

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], *, key: int) -> Handle:
        """Send ``outgoing[r]`` to each rank r, and fill ``incoming[r]`` with what it sends (1D each, maybe empty).

        What a rank sends to itself is copied. Lengths agree pairwise; the data type is one on all ranks.
        """

    def gather_rows(self, row: Tensor) -> Tensor:
        """Return ``[size, n]``: every rank's ``row`` (1D, ``n``), in rank order. Blocks; meant for small rows."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with rank 0's. Blocks."""


class CompressedCollectives(Collectives, Protocol):
    """Collectives that round gradients and keep what they have lacked, to send it later."""

    def state(self) -> Mapping[int, Tensor]:
        """Return by key this rank's slice (1D, float32) of the sum over ranks of what is kept. All ranks call it."""

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Keep what :meth:`state` gave, on any number of ranks, and nothing else."""


class Compression(Protocol):
    """What is put around collectives, so that they send fewer bytes, at the price of rounding."""

    @property
    def rounds_weights(self) -> bool:
        """Whether ``all_gather`` gives all ranks, their owner included, something else than the shards it is given."""

    def around(self, inner: Collectives) -> CompressedCollectives:
        """Return collectives that gather weights and reduce gradients by way of ``inner``, for nothing else."""


# State, as checkpoints see it #


class Piece(Protocol):
    """A flat interval of one tensor of the model or of its optimizer, as this rank holds it."""

    @property
    def name(self) -> str:
        """Fully qualified name of the tensor in the model."""

    @property
    def role(self) -> str:
        """``param``, ``buffer`` or the optimizer's own name of it (``exp_avg``, ...)."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""

    @property
    def start(self) -> int:
        """First element held, in the row-major flattened tensor."""

    @property
    def data(self) -> Tensor:
        """The elements from ``start`` on, 1D: a view of live memory."""


class PartState(Protocol):
    """State of a partitioned model: this rank's pieces, and what is the same on all ranks."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """This rank's share; over all ranks every element of every tensor stands exactly once."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter and buffer of the whole model, by name."""

    @property
    def scalars(self) -> Mapping[str, Json]:
        """Hyperparameters and counters."""


class StateSource(Protocol):
    """Where a part reads its state from: a verified checkpoint."""

    @property
    def roles(self) -> Sequence[str]:
        """Roles present."""

    def shapes_of(self, role: str) -> Mapping[str, torch.Size]:
        """Return the shape of every tensor of one role, by name."""

    @property
    def scalars(self) -> Mapping[str, Json]:
        """As :attr:`PartState.scalars` was when saved."""

    def read(self, role: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1D) with elements ``start ...`` of tensor ``name``, converting the data type if needed."""


# Partitioning #


class GradNorm(Protocol):
    """The global norm of the mean gradient."""

    @property
    def value(self) -> float:
        """L2 norm over all parameters of all ranks; not finite when any gradient is not."""

    @property
    def culprit(self) -> str | None:
        """Name of the first parameter whose gradient is not finite."""

    @property
    def squares(self) -> Sequence[float]:
        """Sums of squares of the summed gradients, by part: the exact sum of those of several models is one norm."""

    @property
    def parts(self) -> Sequence[int | None]:
        """Of each of :attr:`squares`, the number of its parameters in :meth:`Partitioner.shard`'s ``separate``."""

    @property
    def scale(self) -> float:
        """What the root of the sum of :attr:`squares` is multiplied by."""


class ShardUpdate(Protocol):
    """One contiguous shard that an optimizer step rewrites."""

    @property
    def master(self) -> nn.Parameter:
        """1D, the optimizer's parameter (float32 in mixed precision)."""

    @property
    def grad(self) -> Tensor:
        """1D, same length: summed gradient, to be multiplied by ``scale``; may be overwritten."""

    @property
    def copy(self) -> Tensor | None:
        """1D, same length: low-precision copy to refresh from the master, or None."""


class UpdateRule(Protocol):
    """How one optimizer step is run over shards."""

    def __call__(
        self, optimizer: torch.optim.Optimizer, units: Sequence[Sequence[ShardUpdate]], scale: float, /
    ) -> Iterator[int]:
        """Step once over all ``units``; yield each unit's index as soon as its new values stand."""


class OptimizerMaker(Protocol):
    """Makes an optimizer over what a partitioner gives it.

    What that is depends on the key ``update_kind`` of the optimizer's parameter groups: ``elementwise`` (1D shards),
    ``statistics`` (1D parts of tensors, with sums over tensors from the partitioner), ``tensor`` or ``matrix`` (whole
    tensors). A group without the key is stepped as whole tensors, unless its class is an elementwise one of torch.
    """

    @property
    def update(self) -> UpdateRule | None:
        """One pass that scales, steps and refreshes copies; None: ``optimizer.step()``, in three passes."""

    def make(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """Return an optimizer over ``groups``; called again for other parameters, and the last one counts.

        The first call may be for stand-ins, with the names of parameters as ``param_names`` in each group; the
        optimizer may make more groups of them then.
        """


class BlockCall(Protocol):
    """How a block of the model is run: recomputed in the backward pass, for instance."""

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``."""


class Sharded(Protocol):
    """A model whose parameters, gradients and optimizer state are partitioned."""

    @property
    def module(self) -> nn.Module:
        """The model; calling it is the forward pass, ``loss.backward()`` the backward pass."""

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer over the shards: read and set its ``param_groups``, do not call its ``step``."""

    @property
    def access(self) -> Access:
        """Single parameters, gradients and tensors of optimizer state."""

    @property
    def parking(self) -> Parking:
        """Moves state to host memory and back."""

    @property
    def weights(self) -> Weights:
        """All parameters and buffers as the model computes with them."""

    @property
    def has_blocks(self) -> bool:
        """Whether there is a block, without which :meth:`compile` and :meth:`wrap_blocks` raise."""

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""

    def compile(self, **settings: Any) -> None:
        """Compile the model's blocks with ``torch.compile``, its ``settings``, and communication outside of them."""

    def wrap_blocks(self, call: BlockCall) -> None:
        """Run each block of the model as ``call(forward, *args, **kwargs)``."""

    def set_sync(self, *, enabled: bool) -> None:
        """Whether a backward pass sends its gradients; without, they add up locally."""

    def unshard(self, part: nn.Module) -> None:
        """Make the parameters below ``part`` whole on every rank, through all passes until :meth:`reshard`."""

    def reshard(self, part: nn.Module) -> None:
        """Give back what :meth:`unshard` made whole."""

    def reduce(self, part: nn.Module) -> None:
        """Send the gradients below ``part`` now, without waiting for the end of the backward pass."""

    def grad_norm(self) -> GradNorm:
        """Norm of the mean gradient over all micro-batches since the last step. Communicates; all ranks call it."""

    @property
    def micro_batches(self) -> int:
        """Backward passes on this rank since the last step."""

    def step(self, scale: float = 1.0) -> None:
        """Update with the mean gradient times ``scale``, and drop the gradients. All ranks call it."""

    def drop_gradients(self) -> None:
        """Forget all gradients since the last step, and update nothing. All ranks call it."""

    def state(self) -> PartState:
        """Live views of all state, for a checkpoint."""

    def load_state(self, source: StateSource, *, optimizer: bool = True, strict: bool = True) -> None:
        """Replace all state, and drop the gradients; with ``optimizer=False`` only parameters and buffers.

        With ``strict`` a tensor that ``source`` lacks is an error; without, it stays as it is, and so does the
        optimizer's state of it. Raises before anything is written if something is missing or does not fit.
        """


class Partitioner(Protocol):
    """Partitions a model over the ranks it was built for."""

    def shard(
        self,
        model: nn.Module,
        maker: OptimizerMaker | None,
        groups: ParamGroups,
        *,
        separate: Mapping[nn.Parameter, int] = MappingProxyType({}),
    ) -> Sharded:
        """Partition ``model`` in place.

        Args:
            model: It.
            maker: Makes the optimizer; None: nothing is trained.
            groups: Which parameters are trained, with which settings.
            separate: Parameters whose squares stand apart in ``GradNorm.squares``, one sum for each number.
        """


# Schedules #


class LearningRateSchedule(Protocol):
    """What a learning rate schedule has to offer; those of torch and of ds-core do."""

    def step(self) -> None:
        """Go on by one optimizer step."""

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: Any, /) -> None:
        """Replace the state."""


# Pipelines and monitors #


class Monitor(Protocol):
    """Where scalars go."""

    def write(self, events: Mapping[str, float], step: int) -> None:
        """Record ``events`` of optimizer step ``step``."""

    def close(self) -> None:
        """Flush and release."""
