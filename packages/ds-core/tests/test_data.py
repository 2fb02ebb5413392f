"""Dealing: each rank its micro-batches of one global order, on any number of ranks, from any position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ds_core.data import Dealing, MicroBatchSampler, TrainLoader
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset


class Numbers(Dataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def dealing(rank: int = 0, num_ranks: int = 1, **settings: Any) -> Dealing:
    values = {"micro_size": 2, "step_size": 8, "seed": 1, "drop_last": False, **settings}
    return Dealing(rank=rank, num_ranks=num_ranks, **values)


def dealt(count: int, num_ranks: int, **settings: Any) -> list[list[int]]:
    """The global micro-batches of an epoch, put together from all ranks."""
    each = [list(MicroBatchSampler(count, dealing(rank, num_ranks, **settings))) for rank in range(num_ranks)]
    return [each[index % num_ranks][index // num_ranks] for index in range(sum(map(len, each)))]


def two_epochs(loader: TrainLoader) -> Iterator[list[int]]:
    for _ in range(2):
        for batch in loader:
            yield batch.tolist()


@given(st.integers(8, 100), st.booleans())
def test_same_global_order_on_any_number_of_ranks(count: int, drop_last: bool) -> None:
    one = dealt(count, 1, drop_last=drop_last)
    assert dealt(count, 2, drop_last=drop_last) == one
    assert dealt(count, 4, drop_last=drop_last) == one


@given(st.integers(8, 100))
def test_every_sample_once_and_whole_steps(count: int) -> None:
    kept = [index for batch in dealt(count, 2, drop_last=True) for index in batch]
    assert len(kept) == count // 8 * 8
    assert len(set(kept)) == len(kept)
    filled = [index for batch in dealt(count, 2) for index in batch]
    assert len(filled) == -(-count // 8) * 8
    assert set(filled) == set(range(count))


@given(st.integers(1, 7))
def test_a_tiny_dataset_is_repeated_to_fill_a_step(count: int) -> None:
    assert sorted({index for batch in dealt(count, 2) for index in batch}) == list(range(count))
    with pytest.raises(ValueError, match=f"has {count} samples, one optimizer step takes 8 and the last one is drop"):
        MicroBatchSampler(count, dealing(drop_last=True))


def test_an_empty_dataset_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 0 samples, one optimizer step takes 8: use a smaller"):
        TrainLoader(Numbers(0), dealing())


def test_epochs_differ_and_can_be_repeated() -> None:
    loader, again = TrainLoader(Numbers(16), dealing()), TrainLoader(Numbers(16), dealing())
    epochs = [[batch.tolist() for batch in loader] for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs == [[batch.tolist() for batch in again] for _ in range(3)]
    assert len(loader) == len(epochs[0]) == 8


@pytest.mark.parametrize("resumed_ranks", [1, 2, 4])
def test_goes_on_where_it_was_on_another_number_of_ranks(resumed_ranks: int) -> None:
    whole = TrainLoader(Numbers(32), dealing())
    want = [batch.tolist() for _ in range(2) for batch in whole]
    loaders = [TrainLoader(Numbers(32), dealing(rank, 2)) for rank in range(2)]
    streams = [two_epochs(loader) for loader in loaders]
    got = [next(stream) for _ in range(4) for stream in streams]
    state = loaders[0].state_dict()
    assert state == {"epoch": 0, "samples": 16}
    assert loaders[1].state_dict() == state
    resumed = [TrainLoader(Numbers(32), dealing(rank, resumed_ranks)) for rank in range(resumed_ranks)]
    for loader in resumed:
        loader.load_state_dict(state)
    streams = [two_epochs(loader) for loader in resumed]
    got += [batch for batches in zip(*streams, strict=True) for batch in batches]
    assert got == want


def test_leaving_an_epoch_early_starts_the_next() -> None:
    loader = TrainLoader(Numbers(16), dealing())
    next(iter(loader))
    second = [batch.tolist() for batch in loader]
    reference = TrainLoader(Numbers(16), dealing())
    list(reference)
    assert second == [batch.tolist() for batch in reference]


def test_a_position_within_a_step_of_other_ranks_is_an_error() -> None:
    loader = TrainLoader(Numbers(32), dealing(0, 4))
    with pytest.raises(ValueError, match="position in the data is 4 samples into epoch 1, which is no multiple of 2"):
        loader.load_state_dict({"epoch": 1, "samples": 4})


def test_a_batch_is_made_by_the_callers_function() -> None:
    loader = TrainLoader(Numbers(8), dealing(), collate_fn=len)
    assert list(loader) == [2, 2, 2, 2]


def test_tensors_go_to_the_device_wherever_they_stand():
    def collate(samples: list[Tensor]) -> dict[str, object]:
        return {"x": torch.stack(samples), "more": [(samples[0], "text")]}

    batch = next(iter(TrainLoader(Numbers(8), dealing(), collate, device=torch.device("meta"))))
    assert (batch["x"].device.type, batch["more"][0][0].device.type, batch["more"][0][1]) == ("meta", "meta", "text")
