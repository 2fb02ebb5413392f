"""Muon: momentum whose matrices are made orthogonal, with AdamW for everything that is no hidden matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import PlainOptimizer, Work, adam_direction, check_settings

_A, _B, _C = 3.4445, -4.7750, 2.0315  # the quintic of the reference
_TINY = 1e-7

EXCLUDED = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of matrices that AdamW steps: embeddings and the output layer."""


class Muon(PlainOptimizer):
    """Muon for hidden matrices, AdamW for the rest, in one optimizer.

    For a matrix W with gradient G: ``M = momentum * M + (1 - momentum) * G``; U is M, or with Nesterov ``momentum * M
    + (1 - momentum) * G``; O is U with its singular values brought close to 1 by ``ns_steps`` Newton-Schulz steps
    ``X = a X + (b X X^T + c (X X^T)^2) X``; ``W -= lr * (sqrt(max(1, rows / columns)) * O + weight_decay * W)``. More
    than two dimensions (convolutions) are flattened to ``[first, rest]``.

    Each parameter group becomes two: one with ``use_muon`` of the parameters that have two dimensions or more, and one
    without, for AdamW with ``adam_lr``. Where names are known (parameters from ``named_parameters()``; always under
    :func:`ds_zero.shard`) those with a part of :data:`EXCLUDED` in them are AdamW's. What is said explicitly wins: an
    attribute ``use_muon`` of a parameter, as DeepSpeed sets it, or the key ``use_muon`` of a group, which is then kept
    in one piece.

    Partitioned, each matrix is owned by one rank, balanced by cost, and what AdamW steps runs on shards. Memory:
    one momentum per element of a matrix, two moments otherwise.

    Args:
        params: Parameters, names with parameters, or parameter groups.
        lr: Learning rate of matrices, in units of the spectral norm.
        momentum: Decay of the momentum.
        weight_decay: Each step multiplies parameters by ``1 - lr * weight_decay``.
        nesterov: Whether to look ahead.
        ns_steps: Newton-Schulz steps.
        ns_dtype: Data type of these steps: ``bfloat16`` as in the reference, or ``float32``.
        adam_lr: Learning rate of the rest.
        betas: AdamW's decay of the first and the second moment.
        eps: AdamW's addition to the root of the second moment.

    Raises:
        ValueError: A setting is out of its bounds, or Muon is to step a parameter with less than two dimensions.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> optimizer = Muon(layer.named_parameters(), lr=0.02, adam_lr=1e-3)
        >>> [(group["use_muon"], group["lr"]) for group in optimizer.param_groups]
        [(True, 0.02), (False, 0.001)]

    Reference:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(  # noqa: PLR0913 - torch's form: one argument per setting, of two optimizers
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: str = "bfloat16",
        adam_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        adam = {"betas": betas, "eps": eps}
        self._settings = {
            True: {"lr": lr, "weight_decay": weight_decay, **muon, "update_kind": "matrix"},
            False: {"lr": adam_lr, "weight_decay": weight_decay, **adam, "update_kind": "elementwise"},
        }
        super().__init__([part for entry in _entries(params) for part in _split(entry)], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with the key ``use_muon``; settings that it lacks are filled in."""
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(f"use_muon of a parameter group is true or false; got {param_group.get('use_muon')!r}")
        for key, value in self._settings[param_group["use_muon"]].items():
            param_group.setdefault(key, value)
        check_settings(param_group)
        super().add_param_group(param_group)
        flat = [list(param.shape) for param in param_group["params"] if param.dim() < 2]
        if param_group["use_muon"] and flat:
            raise ValueError(f"Muon steps matrices; got parameters of shapes {flat[:8]}: put them into another group")

    def update(self, work: list[Work]) -> None:
        """Step the parameters."""
        for each in work:
            group = each.group
            lr = float(group["lr"])
            each.param.mul_(1 - lr * group["weight_decay"])
            if group["use_muon"]:
                each.param.add_(_orthogonal_direction(each), alpha=-lr)
            else:
                direction = adam_direction(each, group["betas"], group["eps"], bias_correction=True)
                each.param.add_(direction, alpha=-lr)


def orthogonalized(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of a matrix into about [0.7, 1.2] with Newton-Schulz steps.

    Costs ``steps`` times two products of the shorter side and one of both sides: ``4 r c min(r, c)`` operations and
    less. What matters is the direction; the quintic trades exactness for few steps.

    Args:
        matrix: ``[r, c]``.
        steps: How often.
        dtype: Data type of the products.

    Returns:
        ``[r, c]`` in ``dtype``.

    Example:
        >>> orthogonalized(torch.diag(torch.tensor([2.0, -1.0])), 5, torch.float32).sign().tolist()
        [[1.0, 0.0], [0.0, -1.0]]
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp(min=_TINY)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.T


def _orthogonal_direction(each: Work) -> Tensor:
    group, state = each.group, each.state
    if not state:
        state["momentum_buffer"] = torch.zeros_like(each.param, memory_format=torch.preserve_format)
    average = state["momentum_buffer"].lerp_(each.grad, 1 - group["momentum"])
    direction = each.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
    matrix = direction.flatten(1)
    flat = orthogonalized(matrix, group["ns_steps"], getattr(torch, group["ns_dtype"]))
    rows, columns = matrix.shape
    return flat.to(each.param.dtype).mul_(max(1.0, rows / columns) ** 0.5).reshape(each.param.shape)


def _entries(params: ParamsT) -> Iterator[dict[str, Any]]:
    """Yield parameter groups with lists of parameters, and of names where they are known."""
    given: list[Any] = list(params)
    if given and not isinstance(given[0], Mapping):
        given = [{"params": given}]
    for entry in given:
        own = [entry["params"]] if isinstance(entry["params"], Tensor) else list(entry["params"])
        if own and isinstance(own[0], tuple):
            yield {**entry, "params": [param for _, param in own], "param_names": [name for name, _ in own]}
        else:
            yield {**entry, "params": own}


def _split(entry: dict[str, Any]) -> Sequence[dict[str, Any]]:
    if "use_muon" in entry:
        return [entry]
    params, names = entry["params"], entry.get("param_names")
    chosen = [_is_hidden_matrix(param, name) for param, name in zip(params, names or [""] * len(params), strict=True)]
    parts = []
    for use_muon in (True, False):
        indices = [index for index, choice in enumerate(chosen) if choice is use_muon]
        part = {**entry, "use_muon": use_muon, "params": [params[index] for index in indices]}
        if names is not None:
            part["param_names"] = [names[index] for index in indices]
        parts.append(part)
    return parts


def _is_hidden_matrix(param: Tensor, name: str) -> bool:
    marked = vars(param).get("use_muon")
    if marked is not None:
        return bool(marked)
    return param.dim() >= 2 and not any(part in name.lower() for part in EXCLUDED)
