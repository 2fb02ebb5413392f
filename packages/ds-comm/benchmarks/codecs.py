"""Times codes by native code, by torch operations and, where installed, by ds-kernels, alternating in one process.

    python benchmarks/codecs.py --out codecs.md

Contenders code the same numbers into the same bytes. A round calls each of them, one after the other; the figures are
medians over rounds, of the processor's time in one thread. ``encode`` is with an error, as optimizers call it; ``add``
decodes and adds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ds_comm.codecs import BlockCodec, E8Codec
from ds_comm.codecs.native import native_codes
from ds_comm.codecs.plain import PlainCodec
from torch import Tensor

MIN_SECONDS = 0.01  # of one sample; short calls are repeated to fill it
CODECS: dict[str, PlainCodec] = {
    "e8": E8Codec(),
    "sign": BlockCodec(code="sign"),
    "ternary": BlockCodec(code="ternary"),
    "int4 in blocks of 64, float16": BlockCodec(code="int4", block=64, scale_dtype=torch.float16),
}
CALLS = ("encode", "decode", "add")


class Contender(NamedTuple):
    """One implementation of one code, on memory of its own."""

    code: str
    by: str
    payload: Tensor
    calls: dict[str, Callable[[], object]]


def contenders(numel: int) -> list[Contender]:
    found = []
    for code, codec in CODECS.items():
        if native_codes(torch.device("cpu")) is not None:
            found.append(contender(code, "native", numel, codec.encode, codec.decode, codec.accumulate))
        found.append(contender(code, "torch", numel, *in_torch(codec)))
        if isinstance(codec, BlockCodec) and importlib.util.find_spec("ds_kernels") is not None:
            theirs: Any = of_ds_kernels(codec)
            found.append(contender(code, "ds-kernels", numel, theirs.encode, theirs.decode, theirs.accumulate))
    for each in found:
        for other in found:
            assert each.code != other.code or torch.equal(each.payload, other.payload), f"{each.by}, {other.by}"
    return found


def contender(
    code: str,
    by: str,
    numel: int,
    encode: Callable[..., object],
    decode: Callable[..., object],
    add: Callable[..., object],
) -> Contender:
    x, error = torch.randn(numel, generator=torch.Generator().manual_seed(0)), torch.zeros(numel)
    out, total = torch.empty(numel), torch.zeros(numel)
    payload = torch.empty(CODECS[code].payload_bytes(numel), dtype=torch.uint8)
    encode(x, error=torch.zeros(numel), payload=payload)
    scratch = payload.clone()
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(x, error=error, payload=scratch),
        "decode": lambda: decode(payload, out),
        "add": lambda: add(payload, total, scale=1e-3),
    }
    return Contender(code, by, payload, calls)


def in_torch(codec: PlainCodec) -> tuple[Callable[..., object], ...]:
    """What a codec does where there is no native code."""

    def encode(x: Tensor, *, error: Tensor, payload: Tensor) -> None:
        PlainCodec._encode(codec, x, error, payload)

    def decode(payload: Tensor, out: Tensor) -> None:
        PlainCodec._decode(codec, payload, out)

    def add(payload: Tensor, out: Tensor, *, scale: float) -> None:
        PlainCodec._accumulate(codec, payload, out, scale)

    return encode, decode, add


def of_ds_kernels(codec: BlockCodec) -> Any:
    kernels = importlib.import_module("ds_kernels")
    codecs = importlib.import_module("ds_kernels.codecs")
    return codecs.BlockCodec(
        code=codec.code, block=codec.block, scale_dtype=codec.scale_dtype, kernels=kernels.CpuBackend()
    )


def measure(found: list[Contender], numel: int, rounds: int) -> dict[tuple[str, str, str], list[float]]:
    """Return nanoseconds an element, of every round, by code, implementation and call."""
    repeats = {(each.code, each.by, call): repeats_of(each.calls[call]) for each in found for call in CALLS}
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in repeats}
    for _ in range(rounds):
        for each in found:
            for call in CALLS:
                key = (each.code, each.by, call)
                times[key].append(sample(each.calls[call], repeats[key]) * 1e9 / numel)
    return times


def repeats_of(call: Callable[[], object]) -> int:
    call()
    return max(1, round(MIN_SECONDS / sample(call, 1)))


def sample(call: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def report(
    found: list[Contender], times: dict[tuple[str, str, str], list[float]], numel: int, rounds: int, share: float
) -> str:
    lines = [
        f"# Codes on a CPU, {date.today()}",
        "",
        f"torch {torch.__version__}, one thread; {processor()}; {numel} elements of float32.",
        f"{rounds} rounds, contenders alternating in one process, which had a processor for {share:.0%} of the time.",
        "Nanoseconds of the processor's time an element, medians of the rounds; in brackets times the first row of the",
        "code, medians of the quotients within a round. The same bytes in all rows of a code. `encode` is with an",
        "error; `add` decodes and adds to a sum.",
        "",
        "| code | by | encode | decode | add |",
        "|---|---|---|---|---|",
    ]
    first = {each.code: each.by for each in reversed(found)}
    for each in found:
        cells = []
        for call in CALLS:
            own, base = times[each.code, each.by, call], times[each.code, first[each.code], call]
            factor = statistics.median(a / b for a, b in zip(own, base, strict=True))
            cells.append(f"{statistics.median(own):.2f}" + (f" ({factor:.1f})" if each.by != first[each.code] else ""))
        lines.append(f"| {each.code} | {each.by} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=float, default=1 << 20, help="elements: as many as are coded at once")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="write the report as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numel = int(args.numel)
    found = contenders(numel)
    start, used = time.perf_counter(), time.process_time()
    times = measure(found, numel, args.rounds)
    share = (time.process_time() - used) / (time.perf_counter() - start)
    text = report(found, times, numel, args.rounds, share)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
