"""Codes of gradients, chosen by measured links: ``"compression": "auto"``.

[Note: Codes by measured links]
At construction every level of ranks measures its exchanges. The first micro-batches reduce exact gradients: one to warm
up, some to measure what one takes beside its reductions, at least those of a whole step, and one in which every code
is tried, for the squares it loses. Then the slowest rank's times and the mean squares of all ranks make a plan (see
[Note: Plans]), which rank 0 decides and all ranks follow from then on. It is logged, and stands in ``report``.

A micro-batch begins when the buffer that was reduced first is reduced again. Each buffer counts its own micro-batches,
and the plan waits for the last: of several stages of a pipeline on one rank, one may be micro-batches ahead. On a
device that works by itself, times are those of the host: there, give ``compute_seconds``.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .choosing import Level
from .coded.reduction import Feedback
from .compressed import CompressedCollectives
from .config import AutoConfig, CompressionConfig
from .links import LinkCost
from .planning import CODES, EXACT, Bucket, Budget, Plan, evaluated, plan

if TYPE_CHECKING:
    from ds_core.kernel_protocols import KernelBackend
    from ds_core.protocols import Collectives

    from .traffic import Traffic

_logger = logging.getLogger(__package__)

_WARM_UP, _TIMED = 1, 3  # micro-batches, at least; one more tries codes
_SHARE = 0.1  # of a step, for communication, where no target is given


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was measured and chosen; the same on all ranks. Times are those of a micro-batch."""

    plan: Plan
    """What is sent in which code."""
    buckets: tuple[Bucket, ...]
    """What was measured of each buffer."""
    budget: Budget
    """Time."""

    @property
    def bytes_saved(self) -> int:
        """Bytes that a rank sends less for the gradients of a micro-batch."""
        return self.plan.exact_nbytes - self.plan.nbytes

    def __str__(self) -> str:
        counts = {code: self.plan.codes.count(code) for code in CODES if code in self.plan.codes}
        shown = ", ".join(f"{count} {code}" for code, count in counts.items())
        return (
            f"buffers of gradients: {shown}; a rank sends {self.plan.nbytes / 1e6:.3g} MB for a micro-batch and saves "
            f"{self.bytes_saved / 1e6:.3g} MB; codes lose {self.plan.error:.2g} of the squares, to be sent later; "
            f"{self.plan.seconds:.3g} s expected, {self.budget.target:.3g} s wanted, {self.budget.rest:.3g} s without "
            "exchanges"
        )


class LinkAwareCompression:
    """Plays the role ``Compression``: codes gradients as links and time demand; see [Note: Codes by measured links].

    Args:
        config: With ``auto``.
        kernels: Fused kernels of block codes, or None.
        device: Where gradients lie.
        accumulation: Micro-batches of a step.
        costs: What exchanges cost at each level, from the inside out; none: measured.

    Example:
        >>> compression = LinkAwareCompression(CompressionConfig(auto=AutoConfig(step_seconds=0.5)))
        >>> compression.report is None  # until the first steps are over
        True
    """

    def __init__(
        self,
        config: CompressionConfig,
        kernels: KernelBackend | None = None,
        *,
        device: torch.device | None = None,
        accumulation: int = 1,
        costs: Sequence[LinkCost] = (),
    ) -> None:
        self._config, self._kernels = config, kernels
        self._auto = config.auto or AutoConfig()
        self._device = device or torch.device("cpu")
        self._accumulation, self._costs = accumulation, tuple(costs)
        self._levels: list[Level] = []
        self._clock = _Clock(accumulation)
        self._trial = _WARM_UP + max(_TIMED, accumulation) + 1  # which micro-batch of a buffer tries codes
        self.report: Report | None = None

    @property
    def rounds_weights(self) -> bool:
        """Whether weights that were gathered differ from those that were sent."""
        return self._config.weights is not None

    def around(self, inner: Collectives) -> CompressedCollectives:
        """Return ``inner`` with codes around it; measures its exchanges. All ranks call it."""

        def level(traffic: Traffic) -> Level:
            codecs = self._config.codecs_to_choose_from(self._kernels)
            feedback = Feedback() if self._config.error_feedback else None
            made = Level(inner, codecs, traffic, self, feedback=feedback)
            made.cost = self._costs[len(self._levels)] if self._costs else made.probe(self._device)
            self._levels.append(made)
            return made

        return CompressedCollectives(
            inner,
            weights=self._config.codec_of_weights(self._kernels),
            differences=self._config.weight_differences,
            reduction_by=level,
        )

    # What levels ask #

    def begins(self, level: Level, key: int) -> bool:
        """Take note that a level reduces a key; return whether codes are to be tried on it. All ranks call it."""
        if self.report is not None:
            return False
        buffer = self._levels.index(level), key
        if self._clock.is_first(buffer) and self._clock.least() >= self._trial:
            self._decide()
            return False
        return self._clock.count(buffer) == self._trial

    def waited(self, seconds: float) -> None:
        """Take note of time spent in a reduction, or in trying codes."""
        self._clock.waited += seconds

    # Decision #

    def _decide(self) -> None:
        keys = [(level, key) for level in self._levels for key in sorted(level.trials)]
        trials = [level.trials[key] for level, key in keys]
        coding = sum(trial.seconds for trial in trials)
        costs = [cost for level in self._levels for cost in (level.cost.latency, 1 / level.cost.bandwidth)]
        largest = self._agreed([self._clock.rest(_WARM_UP), coding, *costs], maximum=True)
        means = self._agreed(
            [value for trial in trials for value in (trial.squares, *trial.lost.values())], maximum=False
        )
        links = {
            id(level): LinkCost(latency=latency, bandwidth=1 / inverse if inverse else float("inf"))
            for level, latency, inverse in zip(self._levels, largest[2::2], largest[3::2], strict=True)
        }
        buckets, at = [], 0
        for (level, key), trial in zip(keys, trials, strict=True):
            squares, *lost = means[at : (at := at + 1 + len(trial.lost))]
            buckets.append(
                Bucket(
                    name=f"{self._levels.index(level)}.{key}",
                    link=links[id(level)],
                    nbytes=trial.nbytes,
                    lost=dict(zip(trial.lost, lost, strict=True)),
                    squares=squares,
                )
            )
        budget = self._budget(largest[0], largest[1])
        chosen = evaluated(buckets, self._of_first(plan(buckets, budget).codes), budget)
        for level in self._levels:
            codes = zip(keys, chosen.codes, strict=True)
            level.choose({key: code for (owner, key), code in codes if owner is level and code != EXACT})
        self.report = Report(plan=chosen, buckets=tuple(buckets), budget=budget)
        self._tell(self.report)

    def _budget(self, measured: float, coding: float) -> Budget:
        auto, parts = self._auto, self._accumulation
        rest = measured if auto.compute_seconds is None else auto.compute_seconds / parts
        target = rest * (1 + _SHARE) if auto.step_seconds is None else auto.step_seconds / parts
        return Budget(target=target, rest=rest, coding=coding, max_error=auto.max_error)

    def _agreed(self, values: list[float], *, maximum: bool) -> list[float]:
        """Return means, or largest values, over all ranks of all levels; stages may have levels of the same ranks."""
        row = torch.tensor(values, dtype=torch.float64, device=self._device)
        for level in self._levels:
            rows = level.inner.gather_rows(row)
            row = rows.amax(0) if maximum else rows.mean(0)
        return row.tolist()

    def _of_first(self, codes: Sequence[str]) -> list[str]:
        """Return rank 0's codes: first along the outer level, whose first ranks then tell those of their nodes."""
        numbers = torch.tensor([CODES.index(code) for code in codes], dtype=torch.int64, device=self._device)
        for level in reversed(self._levels):
            numbers = level.inner.gather_rows(numbers)[0]
        return [CODES[index] for index in numbers.tolist()]

    def _tell(self, report: Report) -> None:
        if any(level.inner.rank for level in self._levels):
            return
        _logger.info("%s", report)
        if not report.plan.met:
            _logger.warning(
                "a micro-batch will take %.3g s, more than the %.3g s that were wanted; nothing is faster here: coding "
                "takes %.3g s, %.3g s pass without exchanges, and codes may lose %g of a buffer's squares; allow more "
                "time or a larger max_error",
                report.plan.seconds,
                report.budget.target,
                report.budget.coding,
                report.budget.rest,
                report.budget.max_error,
            )


class _Clock:
    """Counts micro-batches, by buffer, and how long they take beside their reductions.

    Args:
        accumulation: Micro-batches of a step, in which those of one stage may follow each other closely.
    """

    def __init__(self, accumulation: int) -> None:
        self.waited = 0.0
        self._accumulation = accumulation
        self._counts: Counter[tuple[int, int]] = Counter()
        self._began = 0.0
        self._rests: list[float] = []

    def is_first(self, buffer: tuple[int, int]) -> bool:
        """Return whether ``buffer`` was the first to be reduced, and note that a micro-batch begins with it."""
        if buffer != next(iter(self._counts), buffer):
            return False
        now = time.perf_counter()
        if self._counts:
            self._rests.append(now - self._began - self.waited)
        self._began, self.waited = now, 0.0
        return True

    def count(self, buffer: tuple[int, int]) -> int:
        """Count a micro-batch of ``buffer``; return how many there were."""
        self._counts[buffer] += 1
        return self._counts[buffer]

    def least(self) -> int:
        """Return the micro-batches of the buffer that has had the fewest."""
        return min(self._counts.values(), default=0)

    def rest(self, skipped: int) -> float:
        """Return the median seconds of a micro-batch without reductions, each a mean over as many as a step has."""
        rests, length = self._rests[skipped:], self._accumulation
        means = [statistics.fmean(rests[at : at + length]) for at in range(len(rests) - length + 1)]
        return max(0.0, statistics.median(means))
