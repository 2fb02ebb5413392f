"""The batch rule: how many samples make one optimizer step."""

from __future__ import annotations

from typing import NamedTuple


class Batch(NamedTuple):
    """Sizes that satisfy ``train = micro * accumulation * ranks``."""

    train: int  # samples of one optimizer step, on all ranks
    micro: int  # samples of one forward pass, on one rank
    accumulation: int  # forward passes of one optimizer step, on one rank


def resolve(train: int | None, micro: int | None, accumulation: int | None, *, ranks: int) -> Batch:
    """Complete the batch sizes: any two of the three determine the third.

    With only ``train`` or only ``micro``, accumulation is 1.

    Args:
        train: Samples of one optimizer step, on all ranks, or None.
        micro: Samples of one forward pass, on one rank, or None.
        accumulation: Forward passes of one optimizer step, or None.
        ranks: Data-parallel ranks.

    Returns:
        All three sizes.

    Raises:
        ValueError: If a size is not positive, if neither ``train`` nor ``micro`` is given, or if no whole number
            satisfies the rule.

    Example:
        >>> resolve(32, 4, None, ranks=2)
        Batch(train=32, micro=4, accumulation=4)
    """
    for name, size in (
        ("train_batch_size", train),
        ("train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if size is not None and size <= 0:
            raise ValueError(f"{name} must be a positive whole number, got {size}")
    if train is None:
        if micro is None:
            raise ValueError(
                "neither train_batch_size nor train_micro_batch_size_per_gpu is given "
                f"(gradient_accumulation_steps is {accumulation}); set at least one of the two"
            )
        accumulation = accumulation or 1
        return Batch(micro * accumulation * ranks, micro, accumulation)
    if micro is None:
        accumulation = accumulation or 1
        parts = f"{accumulation} accumulation steps * {ranks} ranks"
        micro = _quotient(train, accumulation * ranks, parts)
    if accumulation is None:
        accumulation = _quotient(train, micro * ranks, f"micro-batches of {micro} * {ranks} ranks")
    product = micro * accumulation * ranks
    if train != product:
        raise ValueError(
            f"train_batch_size is {train}, but train_micro_batch_size_per_gpu * gradient_accumulation_steps "
            f"* data-parallel ranks is {micro} * {accumulation} * {ranks} = {product}; change one, or leave "
            "one out"
        )
    return Batch(train, micro, accumulation)


def _quotient(train: int, divisor: int, parts: str) -> int:
    if train % divisor:
        raise ValueError(
            f"train_batch_size {train} must be a multiple of {divisor} ({parts}); "
            f"{train // divisor * divisor} and {(train // divisor + 1) * divisor} are"
        )
    return train // divisor
