"""Types of the optional native module; its source is in ``csrc/module.cpp``."""

def isas() -> list[str]: ...

class Kernels:
    def __init__(self, isa: str, /) -> None: ...
    def adam(
        self,
        param: int,
        grad: int,
        exp_avg: int,
        exp_avg_sq: int,
        copy: int,
        numel: int,
        grad_format: int,
        copy_format: int,
        threads: int,
        numbers: tuple[int, float, float, float, float, float, float, bool],
        /,
    ) -> None: ...
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
