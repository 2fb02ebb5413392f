"""The training engine: the step, checkpoints, and what users ask it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from . import loss_scale
from .checkpoint import default_tag
from .policy import Counters, StepOutcome, StepPolicy
from .saving import check_fits, load_schedule
from .state_names import state_kinds
from .stepping import Stepping

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from .access_protocols import Access
    from .data import TrainLoader
    from .loss_scale import LossScale
    from .protocols import Json, LearningRateSchedule, Sharded
    from .saving import Vault


class Engine(Stepping):
    """Trains a partitioned model. Made by :func:`ds_core.initialize`.

    Example:
        A loop over micro-batches; ``step`` updates at the end of each optimizer step and is cheap otherwise::

            for batch in dataloader:
                loss = engine(batch)
                engine.backward(loss)
                engine.step()
    """

    def __init__(
        self,
        sharded: Sharded,
        policy: StepPolicy,
        *,
        scale: LossScale,
        vault: Vault,
        lr_scheduler: LearningRateSchedule | None = None,
        training_dataloader: TrainLoader | None = None,
    ) -> None:
        super().__init__(sharded, policy, scale=scale, lr_scheduler=lr_scheduler)
        self.training_dataloader = training_dataloader
        self._vault = vault

    # Modes #

    def compile(
        self, backend: str | Callable[..., Any] = "inductor", compile_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Compile each block of the model by itself, with communication outside of what is compiled.

        Args:
            backend: Of ``torch.compile``.
            compile_kwargs: Other settings of ``torch.compile``, such as ``{"fullgraph": True}``.

        Raises:
            ValueError: The model has no block to compile.
            RuntimeError: It is compiled already.
        """
        self._sharded.compile(**{"backend": backend, **(compile_kwargs or {})})

    @property
    def is_compiled(self) -> bool:
        """Whether :meth:`compile` was called."""
        return self._sharded.is_compiled

    def train(self, mode: bool = True) -> Engine:  # noqa: FBT001, FBT002 - torch's signature
        """Switch the model between training and evaluation."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Switch the model to evaluation."""
        return self.train(mode=False)

    # Checkpoints #

    def save_checkpoint(
        self, save_dir: str | os.PathLike[str], tag: str | None = None, client_state: Mapping[str, Json] | None = None
    ) -> str:
        """Save everything needed to go on, on any number of ranks at any stage; all ranks call it.

        Args:
            save_dir: Holds one folder per checkpoint; seen by all ranks.
            tag: Name of the folder; None: ``global_step<n>``.
            client_state: JSON values of the caller's (keys are strings), returned by :meth:`load_checkpoint`.

        Returns:
            The checkpoint's folder.

        Raises:
            ValueError: The tag exists, or ``client_state`` or the schedule's state holds what is not JSON.
            RuntimeError: There are gradients that wait for an update.
            RankError: On several ranks: it failed on one of them; the text names the rank and the error.
        """
        pending = self._sharded.micro_batches
        if pending:
            raise RuntimeError(
                f"save_checkpoint() within an optimizer step: the gradients of {pending} micro-batches would be "
                "lost; save after a step() that updated (StepOutcome.boundary), or drop them with zero_grad()"
            )
        counters = self._counters._replace(micro_steps=self._counters.micro_steps * self._policy.num_ranks)
        run = {
            "counters": counters._asdict(),
            "loss_scale": loss_scale.moving(self._scale),
            "data": None if self.training_dataloader is None else self.training_dataloader.state_dict(),
            "client_state": {} if client_state is None else client_state,
        }
        tag = default_tag(self.global_steps) if tag is None else tag
        return self._vault.save(save_dir, tag, self._sharded.state(), run, self.lr_scheduler)

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
    ) -> tuple[str, dict[str, Any]]:
        """Go on from a checkpoint, whatever number of ranks and stage wrote it; all ranks call it.

        Nothing is changed before the whole checkpoint has been verified and found to fit. Then gradients that wait for
        an update are dropped. Settings stay this run's: of a dynamic loss scale, only its position is loaded.

        Args:
            load_dir: Where it was saved.
            tag: Which one; None: the last good one, with a warning that says what was skipped.
            load_module_strict: Whether tensors that only one side has are errors; otherwise they stay as they are.
            load_optimizer_states: Whether to load the optimizer's state and settings, and the loss scale's position.
                Without, they stay as they are; all the rest is loaded.
            load_lr_scheduler_states: Whether to load the schedule.

        Returns:
            The checkpoint's folder, and the caller's own state.

        Raises:
            CheckpointError: It is damaged; the text names file and tensor, and the tag to fall back to.
            ValueError: There is no such tag, or it does not fit model, optimizer, schedule or data loader.
            RankError: On several ranks: one of these, with the ranks that found it.
        """
        schedule = self.lr_scheduler if load_lr_scheduler_states else None
        loader = self.training_dataloader
        state = self._sharded.state()
        check = partial(check_fits, state=state, strict=load_module_strict, schedule=schedule, loader=loader)
        opened = self._vault.open(load_dir, tag, check)
        self._sharded.load_state(opened, optimizer=load_optimizer_states, strict=load_module_strict)
        run: Mapping[str, Any] = opened.run
        self._forwards = self._pending = self._scaled = 0
        counters = Counters(**run["counters"])  # micro-batches of all ranks, whose number may have changed
        self._counters = counters._replace(micro_steps=-(-counters.micro_steps // self._policy.num_ranks))
        if load_optimizer_states:
            self._scale = loss_scale.resumed(self._scale, run["loss_scale"])
        if schedule is not None:
            load_schedule(schedule, run["lr_scheduler"])
        if loader is not None and run["data"] is not None:
            loader.load_state_dict(run["data"])
        return str(opened.path), dict(run["client_state"])

    # Weights #

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,  # noqa: FBT001, FBT002 - DeepSpeed's signature
    ) -> bool:
        """Write the model's weights as it computes with them into one safetensors file; all ranks call it.

        That is bfloat16 or float16 where the configuration says so, and float32 else and for modules that it keeps in
        float32. Rank 0 writes; memory is one whole tensor on each rank, at every stage. Frozen parameters are those
        that require no gradient; buffers are written in any case. A tied parameter is stored once, under its first
        name. Nothing is overwritten, and a file that could not be finished is removed.

        Args:
            save_dir: Created where it does not exist; ranks other than 0 need not see it.
            save_filename: Ends with ``.safetensors``.
            exclude_frozen_parameters: Whether to leave out parameters that are not trained.

        Returns:
            True. (DeepSpeed's returns False where a setting keeps it from gathering; there is none such here.)

        Raises:
            ValueError: The name ends otherwise; or, on rank 0, there is such a file.
            OSError: On rank 0: the file could not be written.
            RuntimeError: On the other ranks, when rank 0 raises anything; on all, if states are in host memory.

        Example:
            >>> import tempfile, torch
            >>> from ds_core import initialize
            >>> config = {"train_batch_size": 1, "bf16": {"enabled": True}}
            >>> engine = initialize(torch.nn.Linear(2, 1), config=config).engine
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     engine.save_16bit_model(folder)
            True
        """
        self._sharded.weights.save(save_dir, name=save_filename, frozen=not exclude_frozen_parameters)
        return True

    def module_state_dict(
        self,
        exclude_frozen_parameters: bool = False,  # noqa: FBT001, FBT002 - DeepSpeed's signature
    ) -> dict[str, Tensor]:
        """Return the whole model's state on rank 0, and nothing on others; all ranks call it.

        Copies in host memory, with the values and data types of :meth:`save_16bit_model`, under all names of the model:
        the model before it was partitioned loads them. (At stage 3 ``engine.module.state_dict()`` has no values.)

        Example:
            >>> import torch
            >>> from ds_core import initialize
            >>> engine = initialize(torch.nn.Linear(2, 1), config={"train_batch_size": 1}).engine
            >>> {name: list(tensor.shape) for name, tensor in engine.module_state_dict().items()}
            {'weight': [1, 2], 'bias': [1]}
        """
        return dict(self._sharded.weights.state_dict(frozen=not exclude_frozen_parameters))

    # State within reach, and out of the way #

    @property
    def access(self) -> Access:
        """Parameters, gradients and optimizer state, one tensor at a time, at every stage.

        Example:
            >>> import torch
            >>> from ds_core import initialize
            >>> engine = initialize(torch.nn.Linear(2, 1), config={"train_batch_size": 1}).engine
            >>> engine.access.set_full_param("bias", torch.tensor([2.0]))
            >>> with engine.access.gathered("bias", writeback_from=0), torch.no_grad():
            ...     _ = engine.module.bias.mul_(3.0)
            >>> engine.access.full_param("bias")
            tensor([6.])
        """
        return self._sharded.access

    def offload_states(
        self,
        include: Iterable[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,  # noqa: FBT001, FBT002 - DeepSpeed's signature
        non_blocking: bool = False,  # noqa: FBT001, FBT002
    ) -> dict[str, int]:
        """Move state from the device to host memory, until :meth:`reload_states`; each rank its own.

        In between the model can be neither run, stepped, saved, loaded nor read.

        Args:
            include: What to move: ``params``, ``masters``, ``optimizer``, ``gradients``; None: all. DeepSpeed's
                ``lp_params``, ``hp_params``, ``optim_states`` and ``lp_grads`` mean the same, in this order; its
                ``contiguous_grad_buffer`` is given back by every call. A tensor that is of two kinds (in float32,
                parameters are their own masters) goes with the first one named.
            device: ``cpu``; there is no other.
            pin_memory: Whether the host memory is pinned, for speed, where the device is a GPU.
            non_blocking: Makes no difference: it returns when memory is free, which is after the copies.

        Returns:
            Bytes that each kind has freed on the device, by this stack's names; 0 where the device is a CPU.

        Raises:
            ValueError: There are no such states, or another device is named.
            RuntimeError: States are in host memory already.

        Example:
            >>> import torch
            >>> from ds_core import initialize
            >>> engine = initialize(torch.nn.Linear(2, 1), config={"train_batch_size": 1}).engine
            >>> engine.offload_states(["optim_states", "hp_params"])  # on a CPU there is nothing to be gained
            {'optimizer': 0, 'masters': 0}
            >>> engine.reload_states()
            0
        """
        del non_blocking
        if device != "cpu":
            raise ValueError(f"states are moved to host memory, device='cpu', got {device!r}")
        parking = self._sharded.parking
        return parking.offload_states(state_kinds(include, parking.kinds), pin_memory=pin_memory)

    def reload_states(self, non_blocking: bool = False) -> int:  # noqa: FBT001, FBT002 - DeepSpeed's signature
        """Move back what :meth:`offload_states` moved, bit for bit; returns the bytes.

        Args:
            non_blocking: Makes no difference: it returns when the states are there.
        """
        del non_blocking
        return self._sharded.parking.reload_states()

    # What users ask #

    def train_batch_size(self) -> int:
        """Samples of one optimizer step, on all ranks."""
        return self._policy.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples of one forward pass on one rank."""
        return self._policy.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        """Forward passes of one optimizer step on one rank."""
        return self._policy.accumulation

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group, as the next update will use it."""
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        """Return the L2 norm of the mean gradient at the last optimizer step, before clipping; None before the first.

        It may be infinite or NaN: then that step was skipped, unless the configuration lets such steps through.
        """
        return self._outcome.grad_norm

    def was_step_applied(self) -> bool:
        """Whether the last :meth:`step` updated the parameters."""
        return self._outcome.boundary and not self._outcome.skipped

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far, skipped ones included."""
        return self._counters.global_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out because gradients were not finite."""
        return self._counters.skipped_steps

    @property
    def global_samples(self) -> int:
        """Samples of all optimizer steps so far, on all ranks."""
        return self._counters.global_steps * self._policy.train_batch_size

    @property
    def counters(self) -> Counters:
        """How far training has come."""
        return self._counters

    @property
    def policy(self) -> StepPolicy:
        """Batch sizes and the like."""
        return self._policy

    @property
    def last_outcome(self) -> StepOutcome:
        """What the last :meth:`step` returned."""
        return self._outcome
