"""Are the GPU kernels right: bits against the CPU, errors against float64, streams, threads, graphs, compiled models.

With ``--device cpu`` the kernels' sources run on the CPU, compiled by g++: that tests these checks and what the kernels
compute, not the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from outcome import NotRun
from torch import Tensor

import ds_kernels
from ds_kernels import AdamHyper, CpuBackend, ReferenceBackend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}  # by bytes of an element
REFERENCE = ReferenceBackend()


def on_host() -> Any:
    """Return the GPU kernels' sources on the CPU."""
    from ds_testkit.cuda_on_host import HostBackend

    backend = HostBackend()
    if (reason := backend.unusable()) is not None:
        raise NotRun(reason)
    return backend


def gpu_backend(name: str, device: torch.device) -> Any:
    """Return the backend whose kernels are tested on ``device``."""
    if device.type == "cpu":
        if name != "nvrtc":
            raise NotRun(f"{name} kernels need a GPU here; its interpreter runs in the tests of ds-kernels")
        return on_host()
    if (info := ds_kernels.backends().get(name)) is None:
        raise NotRun(f"there is no backend {name!r}")
    if info.unusable is not None:
        raise NotRun(info.unusable)
    with ds_kernels.use_backend(name) as backend:
        return backend


def kernel(name: str, op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """Return one kernel of one backend."""
    found: Callable[..., Any] | None = gpu_backend(name, device).find(op, device, dtype)
    if found is None:
        raise NotRun(f"the backend {name!r} has no {op}")
    return found


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors agree in every bit; NaNs need not."""
    got, want = got.cpu(), want.cpu()
    assert got.dtype == want.dtype
    agree = got.view(_BITS[got.itemsize]) == want.view(_BITS[want.itemsize])
    return bool((agree | (got.isnan() & want.isnan())).all())


def adam_state(numel: int, grad_dtype: torch.dtype, copy_dtype: torch.dtype | None) -> list[Tensor | None]:
    """Return param, grad, exp_avg, exp_avg_sq, copy on the CPU, gradients over many orders of magnitude."""
    noise = torch.randn(5, numel, generator=torch.Generator().manual_seed(numel))
    grad = (noise[1] * torch.exp(3 * noise[2]) * 1e-2).to(grad_dtype)
    copy = None if copy_dtype is None else torch.zeros(numel, dtype=copy_dtype)
    return [noise[0], grad, noise[3] * 1e-2, (noise[4] * 1e-2) ** 2, copy]


def stepped(
    adamw: Callable[..., None], state: list[Tensor | None], device: torch.device, hyper: AdamHyper, cut: int = 0
):
    """Return what a step makes of copies of ``state`` without its first ``cut`` elements."""
    *tensors, copy = [None if t is None else t.clone().to(device)[cut:] for t in state]
    adamw(*tensors, copy=copy, hyper=hyper)
    return [t for t in (*tensors, copy) if t is not None]


def steps_have_the_bits_of_the_cpu(device: torch.device) -> None:
    """Every combination of data types, whole packets, tails and misaligned memory, both forms of Adam."""
    adamw = kernel("nvrtc", "adamw", device)
    cpu: Any = CpuBackend() if CpuBackend().unusable() is None else on_host()
    base = AdamHyper(step=3, lr=1e-3, weight_decay=0.1, scale=1 / 3)
    forms = (base, replace(base, decoupled=False), replace(base, beta1=0.3, step=1000), replace(base, weight_decay=0.0))
    for grad, copy, form in product(FLOATS, (None, torch.bfloat16, torch.float16), range(4)):
        for numel, cut in ((1, 0), (1031, 0), (1031, 1), (4096, 2)):
            state = adam_state(numel, grad, copy)
            got = stepped(adamw, state, device, forms[form], cut)
            want = stepped(cpu.adamw, state, torch.device("cpu"), forms[form], cut)
            assert all(map(same_bits, got, want)), (grad, copy, form, numel, cut)


def large_steps_are_as_exact_as_plain_torch(device: torch.device) -> None:
    """Both against float64: the error is at most twice that of torch operations in float32."""
    adamw = kernel("nvrtc", "adamw", device)
    hyper = AdamHyper(step=3, lr=1e-3, weight_decay=0.1)
    state = adam_state(100_003 if device.type == "cpu" else 50_000_001, torch.float32, None)
    p, g, m, v = (t.double() for t in state if t is not None)
    m, v = m * hyper.beta1 + g * (1 - hyper.beta1), v * hyper.beta2 + g * g * (1 - hyper.beta2)
    root = (v / (1 - hyper.beta2**3)).sqrt() + hyper.eps
    exact = p * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * m / (1 - hyper.beta1**3) / root
    errors = []
    for step in (adamw, REFERENCE.adamw):
        result = stepped(step, state, device, hyper)[0]
        errors.append(float((result.cpu().double() - exact).abs().max()))
    assert errors[0] <= 2 * errors[1], errors


def sums_have_the_bits_of_the_cpu(device: torch.device) -> None:
    """The trees of ReferenceBackend, which are the same on any device."""
    tree_sum, chunk_sumsq = (kernel("nvrtc", op, device) for op in ("tree_sum", "chunk_sumsq"))
    for piece, out in product(FLOATS, FLOATS):
        for num_pieces, cut in ((1, 0), (2, 1), (7, 0), (8, 3), (9, 0), (70, 0)):
            pieces = list(torch.randn(num_pieces, 1031).to(piece))
            want, got = torch.empty(1031 - cut, dtype=out), torch.empty(1031 - cut, dtype=out, device=device)
            REFERENCE.tree_sum(want, [p[cut:] for p in pieces])
            tree_sum(got, [p.to(device)[cut:] for p in pieces])
            assert same_bits(got, want), (piece, out, num_pieces, cut)
    for dtype, leaves in product(FLOATS, (1, 2, 3, 12, 21, 64, 100, 1024, 1025, 1026, 2048)):
        x = torch.randn((3 if leaves < 200 else 1) * leaves * 64).to(dtype)
        assert same_bits(chunk_sumsq(x.to(device), leaves * 64), REFERENCE.chunk_sumsq(x, leaves * 64)), (dtype, leaves)


def activations_of(name: str, device: torch.device) -> None:
    """Check bias_gelu and its backward of one backend against float64."""
    forward, backward = (kernel(name, op, device) for op in ("bias_gelu", "bias_gelu_backward"))
    rows = (1, 37) if device.type == "cpu" else (1, 37, 4099)
    for dtype, approximate, num_rows, columns in product(FLOATS, ("none", "tanh"), rows, (3, 260, 1024)):
        x, grad = torch.randn(2, num_rows, columns, device=device).to(dtype)
        bias = torch.randn(columns, device=device).to(dtype)
        exact = [t.double() for t in (grad, x, bias)]
        got = [forward(x, bias, approximate), *backward(grad, x, bias, approximate)]
        torchs = [
            REFERENCE.find("bias_gelu", device, dtype)(x, bias, approximate),
            *REFERENCE.find("bias_gelu_backward", device, dtype)(grad, x, bias, approximate),
        ]
        want = [
            REFERENCE.find("bias_gelu", device, dtype)(*exact[1:], approximate),
            *REFERENCE.find("bias_gelu_backward", device, dtype)(*exact, approximate),
        ]
        for ours, theirs, right in zip(got, torchs, want, strict=True):
            errors = [float((t.double() - right).abs().max()) for t in (ours, theirs)]
            # among few values torch may happen to be exact: there, a unit in the last place is no error
            room = torch.finfo(dtype).eps * float(right.abs().max()) if right.numel() < 2000 else 0.0
            assert errors[0] <= 2 * errors[1] + room, (name, dtype, approximate, num_rows, columns, errors)


def swiglu_of(name: str, device: torch.device) -> None:
    """Check bias_swiglu and its backward of one backend against float64."""
    ops = "bias_swiglu", "bias_swiglu_backward"
    for dtype, num_rows, columns in product(FLOATS, (1, 37), (3, 260, 1024)):
        x, grad = (torch.randn(num_rows, n * columns, device=device).to(dtype) for n in (2, 1))
        bias = torch.randn(2 * columns, device=device).to(dtype)
        for op, inputs in zip(ops, ((x, bias), (grad, x, bias)), strict=True):
            plain = REFERENCE.find(op, device, dtype)
            results = kernel(name, op, device, dtype)(*inputs), plain(*inputs), plain(*(t.double() for t in inputs))
            for ours, theirs, right in zip(*map(_listed, results), strict=True):
                errors = [float((t.double() - right).abs().max()) for t in (ours, theirs)]
                room = torch.finfo(dtype).eps * float(right.abs().max()) if right.numel() < 2000 else 0.0
                assert errors[0] <= 2 * errors[1] + room, (name, op, dtype, num_rows, columns, errors)


def _listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def activations_of_nvrtc_are_as_exact_as_torch(device: torch.device) -> None:
    """Errors of bias_gelu and bias_swiglu, forward and backward, against float64."""
    activations_of("nvrtc", device)
    swiglu_of("nvrtc", device)


def activations_of_triton_are_as_exact_as_torch(device: torch.device) -> None:
    """Errors of bias_gelu and bias_swiglu, forward and backward, against float64."""
    activations_of("triton", device)
    swiglu_of("triton", device)


def exact_norm(total: Tensor, weight: Tensor, bias: Tensor | None = None, *, layer: bool) -> Tensor:
    """Return the norm in the precision of ``total``."""
    centered = total - total.mean(-1, keepdim=True) if layer else total
    out = centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    return out if bias is None else out + bias


def norms_of_nvrtc_are_as_exact_as_torch(device: torch.device) -> None:
    """Errors of layer_norm and rms_norm with a residual, forward and backward, against float64."""
    norms_of("nvrtc", device)


def norms_of_triton_are_as_exact_as_torch(device: torch.device) -> None:
    """Errors of layer_norm and rms_norm with a residual, forward and backward, against float64."""
    norms_of("triton", device)


def norms_of(backend: str, device: torch.device) -> None:
    """Check the norms of one backend against float64."""
    for op, dtype, columns in product(("layer_norm", "rms_norm"), FLOATS, (131, 1028, 5000)):
        plain = [REFERENCE.find(name, device, dtype) for name in (op, f"{op}_backward")]
        if plain[0] is None:
            raise NotRun(f"there is no plain {op} to compare with")
        ours = [kernel(backend, name, device) for name in (op, f"{op}_backward")]
        x, residual, grad, grad_sum = torch.randn(4, 37, columns, device=device).to(dtype)
        weight, bias = torch.randn(2, columns, device=device).to(dtype)
        affine = (weight, bias) if op == "layer_norm" else (weight,)
        got, theirs = (pair[0](x, residual, *affine, 1e-5) for pair in (ours, plain))
        assert same_bits(got[1], theirs[1])
        leaves = [t.double().requires_grad_() for t in (got[1], *affine)]
        exact = exact_norm(*leaves, layer=op == "layer_norm")
        right = list(torch.autograd.grad(exact, leaves, grad.double()))
        right[0] = right[0] + grad_sum.double()
        backward = (grad, grad_sum, got[1], weight, *theirs[2:])
        results = [
            (got[0], theirs[0], exact.detach()),
            *zip(ours[1](*backward), plain[1](*backward), right, strict=True),
        ]
        for a, b, c in results:
            errors = [float((t.double() - c).abs().max()) for t in (a, b)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 4 * float(c.abs().max()), (op, dtype, errors)


def products_of(device: torch.device, *, hopper: bool) -> Callable[[str], Callable[..., Any]]:
    """Return what finds products by name: the kernels of CUTLASS for Hopper, or those for all GPUs."""
    backend = gpu_backend("cutlass", device)
    if hopper and (backend.hopper is None or not backend.hopper.serves(device)):
        missing = "was not built: DS_KERNELS_BUILD_HOPPER=1" if backend.hopper is None else "needs a Hopper GPU"
        raise NotRun(f"the module _hopper {missing}")
    chosen = replace(backend, hopper=backend.hopper if hopper else None)

    def find(op: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = chosen.find(op, device, torch.bfloat16)
        assert found is not None, op
        return found

    return find


def products_of_cutlass_are_as_exact_as_torch(device: torch.device) -> None:
    """Errors of linear_gelu, of what is inside the GELU and of its gradient; tiles that are whole and that are not."""
    check_products(products_of(device, hopper=False), device)


def products_for_hopper_are_as_exact_as_torch(device: torch.device) -> None:
    """The same of the module for Hopper, where it was built."""
    check_products(products_of(device, hopper=True), device)


def check_products(kernel: Callable[[str], Callable[..., Any]], device: torch.device) -> None:
    """Compare with float64 and with torch."""
    for dtype, (rows, columns, inner) in product(FLOATS[1:], ((1, 8, 8), (129, 264, 72), (1000, 1024, 512))):
        x, weight = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
        bias = torch.randn(columns, device=device).to(dtype)
        inside = torch.randn(rows, columns, device=device).to(dtype)
        for op, inputs in (("linear_gelu", (x, weight, bias)), ("linear_dgelu", (x, weight.t().contiguous(), inside))):
            plain = REFERENCE.find(op, device, dtype)
            results = (as_list(f(*args)) for f, args in ((kernel(op), inputs), (plain, inputs)))
            want = as_list(plain(*(t.double() for t in inputs)))
            for a, b, c in zip(*results, want, strict=True):
                errors = [float((t.double() - c).abs().max()) for t in (a, b)]
                assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 4 * float(c.abs().max()), (
                    op,
                    dtype,
                    errors,
                )


def as_list(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return one result, or several, as a list."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def need_gpu(device: torch.device) -> None:
    """Leave a check that only a GPU can run."""
    if device.type == "cpu":
        raise NotRun("needs a GPU")


def ops_are_taken_from_nvrtc_also_in_compiled_models(device: torch.device) -> None:
    """The registry's choice, and a whole graph with the bits of eager."""
    need_gpu(device)
    gpu_backend("nvrtc", device)
    from ds_kernels.ops import bias_gelu

    assert ds_kernels.registry().provider("bias_gelu", device, torch.bfloat16) == "nvrtc"
    x = torch.randn(64, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(512, device=device, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for function in (bias_gelu, torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")):
        out = function(x, bias)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, bias))])
    assert all(map(torch.equal, *results))


def kernels_follow_streams_threads_and_graphs(device: torch.device) -> None:
    """A step waits for what its stream did before; a new thread may step; a captured step can be replayed."""
    need_gpu(device)
    adamw = kernel("nvrtc", "adamw", device)
    hyper = AdamHyper(step=1, lr=1e-3)
    numel = 1 << 20
    zeros = [torch.zeros(numel, device=device) for _ in range(4)]
    want = [t.clone() for t in zeros]
    want[1].fill_(1.0)
    adamw(*want, copy=None, hyper=hyper)

    def step(state: list[Tensor]) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # the gradient comes late
            state[1].fill_(1.0)
            adamw(*state, copy=None, hyper=hyper)
        stream.synchronize()

    for start in (lambda target, args: target(*args), _in_a_thread):
        state = [t.clone() for t in zeros]
        start(step, (state,))
        assert all(map(torch.equal, state, want))
    state = [t.clone() for t in zeros]
    state[1].fill_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw(*state, copy=None, hyper=hyper)
    assert not state[0].any()  # captured, not run
    graph.replay()
    torch.cuda.synchronize(device)
    assert all(map(torch.equal, state, want))


def _in_a_thread(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            target(*args)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


CHECKS: list[Callable[[torch.device], None]] = [
    steps_have_the_bits_of_the_cpu,
    large_steps_are_as_exact_as_plain_torch,
    sums_have_the_bits_of_the_cpu,
    activations_of_nvrtc_are_as_exact_as_torch,
    activations_of_triton_are_as_exact_as_torch,
    norms_of_nvrtc_are_as_exact_as_torch,
    norms_of_triton_are_as_exact_as_torch,
    products_of_cutlass_are_as_exact_as_torch,
    products_for_hopper_are_as_exact_as_torch,
    ops_are_taken_from_nvrtc_also_in_compiled_models,
    kernels_follow_streams_threads_and_graphs,
]
