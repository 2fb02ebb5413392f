"""The optimizers' equations as in the papers, in NumPy and float64, for all workers in one process.

Settings are vectors with one value for each parameter element, so that parameter groups need no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of float64
Gradient = Callable[[int, int, Array], Array]  # of a worker, at a step, at a point
BLOCK = 64


class Settings(NamedTuple):
    workers: int
    steps: int
    lr: Array
    beta1: Array
    beta2: Array
    eps: float
    decay: Array
    corrected: bool = False  # bias correction
    tensors: tuple[slice, ...] = ()


def sign(x: Array) -> Array:
    return np.where(x >= 0, 1.0, -1.0) * np.abs(x).mean()


def ternary(x: Array) -> Array:
    kept = np.abs(x) > 0.7 * np.abs(x).mean()
    return np.sign(x) * kept * (np.abs(x[kept]).mean() if kept.any() else 0.0)


def int4(x: Array) -> Array:
    scale = np.abs(x).max() / 7
    return np.rint(x / scale) * scale if scale else x * 0.0


class CompressedMean:
    """Both errors, both codings."""

    def __init__(self, code: Callable[[Array], Array], workers: int, numel: int) -> None:
        self.code, self.workers = code, np.zeros((workers, numel))
        self.server = np.zeros(numel)

    def __call__(self, values: list[Array]) -> Array:
        if len(values) == 1:
            return values[0].copy()
        totals = np.stack(values) + self.workers
        sent = np.stack([self._coded(total) for total in totals])
        self.workers = totals - sent
        mean = sent.mean(0) + self.server
        result = self._coded(mean)
        self.server = mean - result
        return result

    def _coded(self, x: Array) -> Array:
        return np.concatenate([self.code(x[start : start + BLOCK]) for start in range(0, len(x), BLOCK)])


def one_bit_adam(p: Array, gradient: Gradient, mean: CompressedMean, s: Settings, freeze_step: int) -> Iterator[Array]:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, s.steps + 1):
        gradients = [gradient(worker, t, p) for worker in range(s.workers)]
        c1, c2 = _corrections(s, t, t) if t <= freeze_step else (1.0, 1.0)
        if t <= freeze_step:
            g = sum(gradients) / s.workers
            m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g**2
        else:
            m = mean([s.beta1 * m + (1 - s.beta1) * g for g in gradients])
        p = p - s.lr * ((m / c1) / (np.sqrt(v / c2) + s.eps) + s.decay * p)
        if t == freeze_step:
            m, v = m / c1, v / c2
        yield p


def compressed_adam(p: Array, gradient: Gradient, mean: CompressedMean, s: Settings) -> Iterator[Array]:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(1, s.steps + 1):
        g = mean([gradient(worker, t, p) for worker in range(s.workers)])
        m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g**2
        c1, c2 = _corrections(s, t, t)
        p = p - s.lr * ((m / c1) / (np.sqrt(v / c2) + s.eps) + s.decay * p)
        yield p


def one_bit_lamb(p: Array, gradient: Gradient, mean: CompressedMean, s: Settings, freeze_step: int) -> Iterator[Array]:
    norm = np.linalg.norm
    m, v, fresh, p = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), p.copy()
    averages, last, scale = [0.0] * len(s.tensors), [1.0] * len(s.tensors), np.ones_like(p)
    for t in range(1, s.steps + 1):
        gradients = [gradient(worker, t, p) for worker in range(s.workers)]
        if t <= freeze_step:
            g = sum(gradients) / s.workers
            m, v = s.beta1 * m + (1 - s.beta1) * g, s.beta2 * v + (1 - s.beta2) * g**2
            c1, c2 = _corrections(s, t, t)
            u = (m / c1) / (np.sqrt(v / c2) + s.eps) + s.decay * p
            for i, part in enumerate(s.tensors):
                ratio = 1.0
                if norm(p[part]) > 0 and norm(u[part]) > 0:
                    ratio = np.clip(norm(p[part]) / norm(u[part]), 0.01, 10.0)
                    averages[i] = 0.9 * averages[i] + 0.1 * ratio
                p[part] -= s.lr[part] * ratio * u[part]
            if t == freeze_step:
                m, v = m / c1, v / c2
                fresh = v.copy()
                sizes = [norm(m[part]) / np.sqrt(m[part].size) for part in s.tensors]
                for size, part in zip(sizes, s.tensors, strict=True):
                    scale[part] = np.mean(sizes) / size
        else:
            before = m
            m = mean([(s.beta1 * m + (1 - s.beta1) * g) * scale for g in gradients]) / scale
            g = (m - s.beta1 * before) / (1 - s.beta1)
            fresh = s.beta2 * fresh + (1 - s.beta2) * g**2
            d = m / (np.sqrt(v) + s.eps)
            u = d + s.decay * p
            factors = (np.sqrt(v) + s.eps) / (np.sqrt(fresh) + s.eps)
            for i, part in enumerate(s.tensors):
                share = min(1.0, norm(d[part]) / norm(u[part]))
                factor = np.clip(factors[part].max() * share + 1 - share, 0.5, 4.0)
                last[i] = np.clip(factor, last[i] * 0.9, last[i] * 1.1)
                p[part] -= s.lr[part] * averages[i] * last[i] * u[part]
        yield p.copy()


class Intervals(NamedTuple):
    freeze: int
    kappa: int  # variance updates between doublings of their interval
    scaler: int  # local steps between doublings of their interval
    clipper: int


def zero_one_adam(
    p: Array, gradient: Gradient, mean: CompressedMean, s: Settings, k: Intervals
) -> Iterator[list[Array]]:
    m, v = np.zeros_like(p), np.zeros_like(p)
    interval, updates = 1, 0
    for t in range(1, k.freeze + 1):
        gradients = [gradient(worker, t, p) for worker in range(s.workers)]
        exact = t % interval == 0
        g = sum(gradients) / s.workers if exact else mean(gradients)
        m = s.beta1 * m + (1 - s.beta1) * g
        if exact:
            v, updates = s.beta2 * v + (1 - s.beta2) * g**2, updates + 1
            interval = 2 ** (updates // k.kappa)
        c1, c2 = _corrections(s, t, updates)
        p = p - s.lr * ((m / c1) / (np.sqrt(v / c2) + s.eps) + s.decay * p)
        yield [p] * s.workers
    root, m, mean.server, mean.workers = np.sqrt(v / c2) + s.eps, m / c1, mean.server * 0, mean.workers * 0
    ps, ms, moved = [p] * s.workers, [m] * s.workers, [np.zeros_like(p)] * s.workers
    interval, total = 1, 0.0
    for t in range(k.freeze + 1, s.steps + 1):
        ms = [s.beta1 * m + (1 - s.beta1) * gradient(w, t, ps[w]) for w, m in enumerate(ms)]
        us = [m / root + s.decay * p for m, p in zip(ms, ps, strict=True)]
        ps = [p - s.lr * u for p, u in zip(ps, us, strict=True)]
        moved = [b - s.lr * u for b, u in zip(moved, us, strict=True)]
        total = total + s.lr
        if t % interval == 0:
            b = mean([each * root for each in moved])
            ps = [ps[0] - moved[0] + b / root] * s.workers
            ms, moved, total = [-b / total] * s.workers, [np.zeros_like(p)] * s.workers, 0.0
        interval = min(k.clipper, 2 ** ((t - k.freeze) // k.scaler))
        yield ps


def diloco(p: Array, gradient: Gradient, mean: CompressedMean, s: Settings, every: int) -> Iterator[list[Array]]:
    """Inner SGD with ``s.lr``; outer learning rate 0.7 and momentum 0.9."""
    ps, b, anchor = [p] * s.workers, np.zeros_like(p), p
    for t in range(1, s.steps + 1):
        ps = [p - s.lr * gradient(worker, t, p) for worker, p in enumerate(ps)]
        if t % every == 0:
            d = mean([anchor - p for p in ps])
            b = 0.9 * b + d
            anchor = anchor - 0.7 * (d + 0.9 * b)
            ps = [anchor] * s.workers
        yield ps


def _corrections(s: Settings, first: int, second: int) -> tuple[Array, Array]:
    return (1 - s.beta1**first, 1 - s.beta2**second) if s.corrected else (1.0, 1.0)
