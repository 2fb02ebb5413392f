"""Names of the states that can be moved to host memory: this stack's own, and those of DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_OF_DEEPSPEED = {
    "lp_params": "params",
    "hp_params": "masters",
    "optim_states": "optimizer",
    "lp_grads": "gradients",
    "contiguous_grad_buffer": None,  # for communication: holds no state, and is given back whatever is moved
}


def state_kinds(include: Iterable[str] | None, kinds: Sequence[str]) -> list[str]:
    """Return which of ``kinds`` are meant by ``include``: their names or DeepSpeed's; None: all of them.

    Raises:
        ValueError: A name is neither.

    Example:
        >>> state_kinds(["hp_params", "masters", "optimizer"], ["params", "masters", "optimizer"])
        ['masters', 'optimizer']
    """
    named = {**_OF_DEEPSPEED, **{kind: kind for kind in kinds}}
    chosen = list(kinds) if include is None else list(include)
    unknown = [name for name in chosen if name not in named]
    if unknown:
        raise ValueError(
            f"there are no states {', '.join(map(repr, unknown))}; there are {', '.join(kinds)}, and by DeepSpeed's "
            f"names {', '.join(_OF_DEEPSPEED)}"
        )
    return list(dict.fromkeys(kind for kind in (named[name] for name in chosen) if kind is not None))
