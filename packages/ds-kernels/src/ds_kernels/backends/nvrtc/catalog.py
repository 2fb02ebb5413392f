"""Every kernel there is: for those who compile them all, before they are needed or to look at what they use."""

from __future__ import annotations

from itertools import product

import torch

from ..payload import DIGITS, Layout
from .activations import bias_gelu_kernel, bias_swiglu_kernel
from .codecs import ROOMS, decode_kernel, encode_kernel
from .dropout import bias_dropout_kernel
from .kernel import FORMATS, Kernel
from .norms import norm_kernel, norm_weights_kernel
from .optimizers import FORMULAS
from .reductions import chunk_sumsq_kernel, tree_sum_kernel
from .softmax import softmax_kernel
from .steps import step_kernel


def all_kernels() -> list[Kernel]:
    """List all kernels.

    Example:
        >>> len({kernel.name for kernel in all_kernels()}) == len(all_kernels())
        True
    """
    both = (False, True)
    scales = (torch.float32, torch.float16)
    layouts = [Layout(code, room, scale) for code, room, scale in product(DIGITS, ROOMS, scales)]
    return [
        *_steps(),
        *(tree_sum_kernel(piece, out) for piece, out in product(FORMATS, FORMATS)),
        *(chunk_sumsq_kernel(x) for x in FORMATS),
        *(bias_gelu_kernel(x, a, backward=b) for x, a, b in product(FORMATS, ("none", "tanh"), both)),
        *(bias_swiglu_kernel(x, backward=b) for x, b in product(FORMATS, both)),
        *(
            norm_kernel(x, layer=layer, threads=t, backward=b)
            for x, layer, t, b in product(FORMATS, both, (64, 256), both)
        ),
        *(norm_weights_kernel(x, layer=layer) for x, layer in product(FORMATS, both)),
        *(encode_kernel(x, layout) for x, layout in product(FORMATS, layouts)),
        *(decode_kernel(out, layout, accumulate=False) for out, layout in product(FORMATS, layouts)),
        *(decode_kernel(torch.float32, layout, accumulate=True) for layout in layouts),
        *(bias_dropout_kernel(x, backward=b) for x, b in product(FORMATS, both)),
        *(softmax_kernel(x, threads=t, backward=b) for x, t, b in product(FORMATS, (64, 256), both)),
    ]


def _steps() -> list[Kernel]:
    """List the steps on tensors as the optimizers keep them: states all of one kind."""
    kernels = []
    for formula, (args, codes) in FORMULAS.items():
        grads = ("None",) if formula == "LambStep" else tuple(FORMATS.values())
        copies = ("None",) if formula == "LambMoments" else ("None", "BFloat16", "Float16")
        kinds = {tuple(names) for names in (["Float32"] * len(codes), ["BFloat16"] * len(codes), codes)}
        kernels += [
            step_kernel(formula, args, (param, grad, copy, *(*kind, "None", "None")[:2]))
            for param, grad, copy, kind in product(("Float32", "Split"), grads, copies, sorted(kinds))
        ]
    return kernels
