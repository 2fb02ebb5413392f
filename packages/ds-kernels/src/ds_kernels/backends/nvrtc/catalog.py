"""Every kernel there is: for those who compile them all, before they are needed or to look at what they use."""

from __future__ import annotations

from itertools import product

import torch

from .activations import bias_gelu_kernel, bias_swiglu_kernel
from .kernel import FORMATS, Kernel
from .norms import norm_kernel, norm_weights_kernel
from .optimizers import adamw_kernel
from .reductions import chunk_sumsq_kernel, tree_sum_kernel


def all_kernels() -> list[Kernel]:
    """List all kernels.

    Example:
        >>> len({kernel.name for kernel in all_kernels()}) == len(all_kernels())
        True
    """
    both = (False, True)
    copies = (None, torch.bfloat16, torch.float16)
    return [
        *(adamw_kernel(g, c, decoupled=d) for g, c, d in product(FORMATS, copies, both)),
        *(tree_sum_kernel(piece, out) for piece, out in product(FORMATS, FORMATS)),
        *(chunk_sumsq_kernel(x) for x in FORMATS),
        *(bias_gelu_kernel(x, a, backward=b) for x, a, b in product(FORMATS, ("none", "tanh"), both)),
        *(bias_swiglu_kernel(x, backward=b) for x, b in product(FORMATS, both)),
        *(
            norm_kernel(x, layer=layer, threads=t, backward=b)
            for x, layer, t, b in product(FORMATS, both, (64, 256), both)
        ),
        *(norm_weights_kernel(x, layer=layer) for x, layer in product(FORMATS, both)),
    ]
