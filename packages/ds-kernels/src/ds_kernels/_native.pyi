"""Types of the optional native module; its source is in ``csrc/module.cpp``."""

from typing import TypeAlias

_Operand: TypeAlias = tuple[int, int, int]  # data, extra, codec
# param, grad, states, copy, zero_grad, numel, threads
_Arrays: TypeAlias = tuple[_Operand, _Operand, list[_Operand], _Operand, bool, int, int]
_Key: TypeAlias = tuple[int, int, float]  # seed, threshold, scale
_LambNumbers: TypeAlias = tuple[int, float, float, float, float, float, float]

def isas() -> list[str]: ...

class Kernels:
    def __init__(self, isa: str, /) -> None: ...
    def bias_gelu(
        self, x: int, bias: int, out: int, rows: int, columns: int, x_format: int, tanh: bool, threads: int, /
    ) -> None: ...
    def bias_gelu_backward(
        self,
        grad: int,
        x: int,
        bias: int,
        grad_x: int,
        grad_bias: int,
        rows: int,
        columns: int,
        x_format: int,
        tanh: bool,
        threads: int,
        /,
    ) -> None: ...
    def bias_swiglu(
        self, x: int, bias: int, out: int, rows: int, columns: int, x_format: int, threads: int, /
    ) -> None: ...
    def bias_swiglu_backward(
        self,
        grad: int,
        x: int,
        bias: int,
        grad_x: int,
        grad_bias: int,
        rows: int,
        columns: int,
        x_format: int,
        threads: int,
        /,
    ) -> None: ...
    def bias_dropout(
        self,
        tensors: tuple[int, int, int, int],
        shape: tuple[int, int],
        key: _Key,
        x_format: int,
        threads: int,
        /,
    ) -> None: ...
    def bias_dropout_backward(
        self, tensors: tuple[int, int, int], shape: tuple[int, int], key: _Key, x_format: int, threads: int, /
    ) -> None: ...
    def softmax(
        self,
        tensors: tuple[int, int, int, int],
        shape: tuple[int, int, int, int],
        strides: tuple[int, int, int],
        form: tuple[float, bool],
        key: _Key,
        scores_format: int,
        threads: int,
        /,
    ) -> None: ...
    def softmax_backward(
        self,
        tensors: tuple[int, int, int],
        shape: tuple[int, int, int, int],
        form: tuple[float, bool],
        key: _Key,
        grad_format: int,
        threads: int,
        /,
    ) -> None: ...
    def math(self, function: int, fine: bool, x: int, out: int, n: int, /) -> None: ...
    def norm(
        self,
        inputs: tuple[int, int, int, int],
        outputs: tuple[int, int, int, int],
        shape: tuple[int, int],
        eps: float,
        x_format: int,
        centered: bool,
        threads: int,
        /,
    ) -> None: ...
    def norm_backward(
        self,
        inputs: tuple[int, int, int, int, int, int],
        outputs: tuple[int, int, int],
        shape: tuple[int, int],
        x_format: int,
        centered: bool,
        threads: int,
        /,
    ) -> None: ...
    def adam(self, arrays: _Arrays, numbers: tuple[int, float, float, float, float, float, float, bool], /) -> None: ...
    def lion(self, arrays: _Arrays, numbers: tuple[float, float, float, float, float], /) -> None: ...
    def adagrad(self, arrays: _Arrays, numbers: tuple[int, float, float, float, float, float], /) -> None: ...
    def sgd(self, arrays: _Arrays, numbers: tuple[float, float, float, float, bool, bool, float], /) -> None: ...
    def lamb_moments(self, arrays: _Arrays, numbers: _LambNumbers, /) -> tuple[float, float]: ...
    def lamb_step(self, arrays: _Arrays, numbers: _LambNumbers, /) -> None: ...
    def cross_entropy(
        self,
        logits: int,
        target: int,
        scales: int,
        losses: int,
        rows: int,
        columns: int,
        logits_format: int,
        differentiate: bool,
        threads: int,
        terms: tuple[int, float, float],
        /,
    ) -> None: ...
    def block_encode(
        self,
        x: int,
        error: int,
        payload: int,
        numel: int,
        x_format: int,
        layout: tuple[int, int, int],
        threads: int,
        /,
    ) -> None: ...
    def block_decode(
        self, out: int, payload: int, numel: int, out_format: int, layout: tuple[int, int, int], threads: int, /
    ) -> None: ...
    def block_accumulate(
        self, out: int, payload: int, numel: int, layout: tuple[int, int, int], weight: float, threads: int, /
    ) -> None: ...
    def tree_sum(
        self, out: int, pieces: list[int], numel: int, piece_format: int, out_format: int, threads: int, /
    ) -> None: ...
    def chunk_sumsq(self, x: int, sums: int, chunk: int, num_chunks: int, x_format: int, threads: int, /) -> None: ...
