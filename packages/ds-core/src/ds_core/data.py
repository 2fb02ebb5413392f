"""Dealing a dataset to ranks as global micro-batches.

[Note: Global micro-batches]
An epoch is one permutation of the dataset, cut into global micro-batches of equal size; it depends on the seed and
the epoch only. Rank r of N takes the micro-batches r, N + r, 2 N + r, ... So accumulation step i on rank r is global
micro-batch ``i * N + r`` of its optimizer step, on any number of ranks, which is what bit-equality rests on, and a
position in the data is a number of global micro-batches, valid on any number of ranks. Epochs end on whole
optimizer steps: the last one is dropped or completed from the start of the permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Sampler


@dataclass(frozen=True, kw_only=True, slots=True)
class Dealing:
    """Who gets what."""

    rank: int
    """This rank."""
    num_ranks: int
    """Ranks that share the data."""
    micro_size: int
    """Samples of one micro-batch."""
    step_size: int
    """Samples of one optimizer step on all ranks; a multiple of ``micro_size * num_ranks``."""
    seed: int
    """Key of the permutations."""
    drop_last: bool
    """Whether a last optimizer step that is not full is dropped; otherwise it is completed."""


class MicroBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches of one epoch, as lists of sample indices.

    See [Note: Global micro-batches].

    Args:
        num_samples: Length of the dataset.
        dealing: Who gets what.

    Raises:
        ValueError: The dataset is too short for one optimizer step.

    Example:
        >>> dealing = Dealing(rank=1, num_ranks=2, micro_size=2, step_size=4, seed=0, drop_last=False)
        >>> sampler = MicroBatchSampler(8, dealing)
        >>> len(sampler), [len(batch) for batch in sampler]
        (2, [2, 2])
    """

    def __init__(self, num_samples: int, dealing: Dealing) -> None:
        self._num_samples = num_samples
        self._dealing = dealing
        num_steps = num_samples // dealing.step_size if dealing.drop_last else -(-num_samples // dealing.step_size)
        if num_steps == 0:
            raise ValueError(
                f"the dataset has {num_samples} samples, one optimizer step takes {dealing.step_size}"
                f"{' and the last one is dropped (dataloader_drop_last)' if num_samples else ''}: use a smaller "
                "train_batch_size or more data"
            )
        self._used_samples = num_steps * dealing.step_size
        self.epoch = 0
        self.start = 0  # global micro-batches of the epoch to leave out

    def __iter__(self) -> Iterator[list[int]]:
        dealing = self._dealing
        generator = torch.Generator().manual_seed(dealing.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._num_samples, generator=generator).tolist()
        repeats = -(-self._used_samples // self._num_samples)
        order = (order * repeats)[: self._used_samples]
        first = self.start + dealing.rank
        for index in range(first, self._used_samples // dealing.micro_size, dealing.num_ranks):
            yield order[index * dealing.micro_size : (index + 1) * dealing.micro_size]

    def __len__(self) -> int:
        return self._used_samples // (self._dealing.micro_size * self._dealing.num_ranks)


class TrainLoader:
    """An iterable over this rank's micro-batches, which can say where it is and go on from there.

    Each iteration is one epoch with its own permutation; the first one after :meth:`load_state_dict` goes on where
    the state was taken.

    Args:
        dataset: Map-style, with a length.
        dealing: Who gets what.
        collate_fn: Makes a batch of a list of samples; None stacks tensors.
        device: Where the tensors of a micro-batch go, also those in nested lists, tuples and dictionaries.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        dealing: Dealing,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self._sampler = MicroBatchSampler(len(cast("Sized", dataset)), dealing)
        self._loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=self._sampler, collate_fn=collate_fn)
        self._num_ranks = dealing.num_ranks
        self._micro_size = dealing.micro_size
        self._device = device
        self._epoch = 0
        self._taken = 0  # global micro-batches of this epoch that were handed out, on all ranks
        self._resumed = False

    @property
    def dataset(self) -> Dataset[Any]:
        """The dataset."""
        return self._loader.dataset

    def __len__(self) -> int:
        """Micro-batches of one epoch on this rank."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        if self._taken and not self._resumed:
            self._next_epoch()  # the last iteration was left early
        self._resumed = False
        self._sampler.epoch, self._sampler.start = self._epoch, self._taken
        for batch in self._loader:
            self._taken += self._num_ranks
            yield batch if self._device is None else _moved(batch, self._device)
        self._next_epoch()

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, and samples handed out in it on all ranks."""
        return {"epoch": self._epoch, "samples": self._taken * self._micro_size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a position, also one of another number of ranks.

        Raises:
            ValueError: See :meth:`check_state_dict`.
        """
        self.check_state_dict(state)
        self._epoch, self._taken, self._resumed = state["epoch"], state["samples"] // self._micro_size, True

    def check_state_dict(self, state: Mapping[str, int]) -> None:
        """Raise unless :meth:`load_state_dict` can go on from a position.

        Raises:
            ValueError: It lies within a global micro-batch of this loader.
        """
        epoch, samples = state["epoch"], state["samples"]
        if samples % (self._micro_size * self._num_ranks):
            raise ValueError(
                f"the position in the data is {samples} samples into epoch {epoch}, which is no multiple of "
                f"{self._micro_size} samples x {self._num_ranks} ranks: save at the end of an optimizer step, and "
                "keep the global batch size"
            )

    def _next_epoch(self) -> None:
        self._epoch, self._taken = self._epoch + 1, 0


def _moved(batch: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
