"""Runs every CUDA kernel of the library at least once on small inputs and compares the results with float64.

    compute-sanitizer --kernel-name kns=fips python benchmarks/gpu_every_kernel.py
    python benchmarks/gpu_every_kernel.py --coverage

Small enough for memory and race checkers. ``--coverage`` also records which kernels ran, and fails if the
sources define one that did not. ``--dry-run`` runs the same calls on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from cpu_shapes import Shape, SharedMlp
from gpu_shapes import Pattern, make_mlps, make_slice
from gpu_timing import check_close, describe
from race import dtype_name
from torch import Tensor

from fips_ext import BlockSparse, _library, functional, reference
from fips_ext.layout import Encoding

SOURCES = Path(__file__).resolve().parent.parent / "csrc/kernels/cuda"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
ENCODINGS: tuple[Encoding, ...] = ("block", "bitmap")
BOUND = 0.03  # rounding of halves in a chain of products; a wrong index is far above

Check = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    check: Check


def randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def in_double(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().double()
    return value.with_values(value.values.detach().double()) if isinstance(value, BlockSparse) else value


# -- products ------------------------------------------------------------------------------------------------


def products(device: str) -> Iterator[Case]:
    """Every element type, encoding and direction, blocks of every edge, few tokens and many, ragged edges."""
    shapes = (
        (5, 100, 150, (32, 16)),
        (70, 100, 2200, (16, 16)),
        (260, 80, 2200, (32, 16)),
        (300, 192, 640, (64, 64)),
        (300, 256, 640, (128, 64)),
        (300, 1024, 640, (64, 128)),
    )
    for (tokens, r, n, block), dtype, encoding in itertools.product(shapes, DTYPES, ENCODINGS):
        name = f"product {tokens}x{r}x{n} {block} {dtype_name(dtype)} {encoding}"
        pattern = Pattern(0.4, block, encoding)
        yield Case(name, lambda p=pattern, t=tokens, r=r, n=n, d=dtype: product(device, d, t, r, n, p))
    # Tokens too wide for shared memory, and enough output blocks for the tallest tile.
    tall = Pattern(0.1, (32, 16))
    yield Case("product, tall tile", lambda: product(device, torch.bfloat16, 130, 2048, 2240, tall))
    # Few input features, and work enough for Hopper to keep tokens in shared memory.
    kept = Pattern(0.5, (64, 64))
    for dtype in HALVES:
        name = f"product that keeps its tokens {dtype_name(dtype)}"
        yield Case(name, lambda d=dtype: product(device, d, 1500, 256, 2240, kept))
    yield Case("product in TF32", lambda: product_in_tf32(device))


def product_in_tf32(device: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for tokens in (5, 130):
            product(device, torch.float32, tokens, 192, 640, Pattern(0.4, (64, 64)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def product(device: str, dtype: torch.dtype, tokens: int, r: int, n: int, pattern: Pattern) -> None:
    v = make_slice(r, n, pattern, dtype, device)
    for transpose in (False, True):
        x = randn(device, dtype, tokens, n if transpose else r)
        bias = randn(device, dtype, r if transpose else n)
        exact = reference.block_sparse_mm(x.double(), in_double(v), transpose, bias.double())
        check_close(functional.block_sparse_mm(x, v, transpose, bias), exact, BOUND)


def sampled_products(device: str) -> Iterator[Case]:
    """Sampled, in one range of tokens and in several, and dense with the stored blocks gathered."""
    for dtype, density, encoding in itertools.product(DTYPES, (0.1, 1.0), ENCODINGS):
        pattern = Pattern(density, (64, 64), encoding)
        name = f"sampled product p={density} {dtype_name(dtype)} {encoding}"
        yield Case(name, lambda p=pattern, d=dtype: sampled_product(device, d, p))


def sampled_product(device: str, dtype: torch.dtype, pattern: Pattern) -> None:
    v = make_slice(700, 300, pattern, dtype, device)
    for tokens in (3, 600, 1100):
        a, b = randn(device, dtype, tokens, v.rows), randn(device, dtype, tokens, v.cols)
        exact = reference.block_sparse_sddmm(a.double(), b.double(), in_double(v))
        check_close(functional.block_sparse_sddmm(a, b, v), exact, BOUND)


# -- whole MLPs ----------------------------------------------------------------------------------------------

NARROW = (Shape("narrow", 64, 256), Shape("narrow gated", 64, 256, "silu", gated=True))
WIDE = (Shape("wide", 832, 320), Shape("wide gated", 832, 320, "gelu_tanh", gated=True))


def whole_mlps(device: str) -> Iterator[Case]:
    """Decoding, the chain, slices filled up (bitmap), and the fused kernel (narrow, halves, many tokens)."""
    for shape, dtype, encoding in itertools.product((*NARROW, *WIDE), DTYPES, ENCODINGS):
        name = f"MLP {shape.name} {dtype_name(dtype)} {encoding}"
        yield Case(name, lambda s=shape, d=dtype, e=encoding: whole_mlp(device, s, d, e))
    tokens = fused_tokens(device)
    for shape, dtype in itertools.product(NARROW, HALVES):
        name = f"MLP {shape.name} {dtype_name(dtype)} fused"
        yield Case(name, lambda s=shape, d=dtype: whole_mlp(device, s, d, "block", (tokens,)))
    for shape, dtype in itertools.product((NARROW[0], WIDE[1]), (torch.bfloat16, torch.float32)):
        name = f"gradients {shape.name} {dtype_name(dtype)}"
        yield Case(name, lambda s=shape, d=dtype: gradients(device, s, d))
        name = f"loss {shape.name} {dtype_name(dtype)}"
        yield Case(name, lambda s=shape, d=dtype: loss(device, s, d))


def fused_tokens(device: str) -> int:
    """Tokens for which the fused kernel runs (prefers_fused_mlp): its tiles fill half of the GPU."""
    multiprocessors = 4 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    return 32 * multiprocessors + 64


def new_mlp(device: str, shape: Shape, dtype: torch.dtype, encoding: Encoding) -> SharedMlp:
    return make_mlps(shape, shape.d // 2, Pattern(0.3, (32, 32), encoding), dtype, device).ours


def whole_mlp(
    device: str,
    shape: Shape,
    dtype: torch.dtype,
    encoding: Encoding,
    counts: Sequence[int] = (1, 13, 150),
) -> None:
    mlp = new_mlp(device, shape, dtype, encoding)
    exact = {name: in_double(value) for name, value in mlp.arguments().items()}
    for tokens in counts:
        x = randn(device, dtype, tokens, shape.d)
        check_close(mlp(x), reference.shared_mlp(x.double(), **exact), BOUND)


def exact_gradients(
    mlp: SharedMlp, x: Tensor, through: Callable[[Tensor, SharedMlp], Tensor], grad: Tensor | None
) -> list[Tensor]:
    exact = SharedMlp(**{name: in_double(value) for name, value in mlp.arguments().items()})
    inputs = [t.requires_grad_() for t in (x.double(), *exact.parameters())]
    with torch.enable_grad():
        return list(torch.autograd.grad(through(inputs[0], exact), inputs, grad, allow_unused=True))


def gradients(device: str, shape: Shape, dtype: torch.dtype) -> None:
    mlp = new_mlp(device, shape, dtype, "block")
    x, grad_y = (randn(device, dtype, 200, shape.d) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, *mlp.parameters())]
    with torch.enable_grad():
        found = torch.autograd.grad(mlp(x), inputs, grad_y)

    def forward(x: Tensor, mlp: SharedMlp) -> Tensor:
        return reference.shared_mlp(x, **mlp.arguments())

    expected = exact_gradients(mlp, x.detach(), forward, grad_y.double())
    for a, b in zip(found, expected, strict=True):
        check_close(a, b, BOUND)


def loss(device: str, shape: Shape, dtype: torch.dtype) -> None:
    mlp = new_mlp(device, shape, dtype, "block")
    x, target = (randn(device, dtype, 200, shape.d) for _ in range(2))
    weight = torch.rand(200, device=device)
    scale = 1 / target.numel()
    parameters = [t.requires_grad_() for t in mlp.parameters()]
    with torch.enable_grad():
        value = functional.reconstruction_loss(x, target, scale, token_weight=weight, **mlp.arguments())
        found = torch.autograd.grad(value, parameters)

    def forward(x: Tensor, mlp: SharedMlp) -> Tensor:
        arguments = mlp.arguments()
        return reference.reconstruction_loss(x, target.double(), scale, token_weight=weight, **arguments)

    for a, b in zip(found, exact_gradients(mlp, x, forward, None)[1:], strict=True):
        check_close(a, b, BOUND)


# -- initialisation ------------------------------------------------------------------------------------------


def initialisation(device: str) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float64):
        for rank in (10, 40):
            yield Case(f"rsvd {rank} {dtype_name(dtype)}", lambda d=dtype, k=rank: rsvd(device, d, k))
        for width in (24, 300, 600):  # one block each, several, the vendor's
            yield Case(f"eigh {width} {dtype_name(dtype)}", lambda d=dtype, w=width: eigh(device, d, w))
        yield Case(f"gram update {dtype_name(dtype)}", lambda d=dtype: gram_update(device, d))


def rsvd(device: str, dtype: torch.dtype, rank: int) -> None:
    """Of matrices of that rank, so that the product of the factors is the matrix."""
    w = randn(device, dtype, 2, 60, rank) @ randn(device, dtype, 2, rank, 90)
    u, s, vh = torch.ops.fips.batched_rsvd(w, rank)
    check_close((u * s.unsqueeze(1)) @ vh, w.double(), 1e-3)


def eigh(device: str, dtype: torch.dtype, width: int) -> None:
    w = randn(device, dtype, 2, width, 2 * width)
    values, vectors = torch.ops.fips.batched_gram_eigh(w, 0.01)
    gram = w.double() @ w.double().mT
    damping = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(1)
    exact = gram + damping[:, None, None] * torch.eye(width, device=device)
    check_close((vectors * values.unsqueeze(1)) @ vectors.mT, exact, 1e-3)


def gram_update(device: str, dtype: torch.dtype) -> None:
    gram = torch.zeros(40, 40, dtype=dtype, device=device)
    exact = torch.zeros(40, 40, dtype=torch.float64, device=device)
    for x in (randn(device, dtype, 70, 40), randn(device, torch.bfloat16, 70, 40)):
        torch.ops.fips.gram_update(gram, x)
        exact += x.double().T @ x.double()
    check_close(gram, exact, 1e-4)


# -- which kernels there are, and which ran ------------------------------------------------------------------


def kernel_names(folder: Path, capability: int) -> list[str]:
    """The kernels that the sources define for a GPU; files named ``sm90`` are for capability 90 alone."""
    pattern = re.compile(r"FIPS_KERNEL\([^()]*\)\s+(\w+)\(")
    names: set[str] = set()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")]):
        if "sm90" not in path.name or capability == 90:
            names.update(pattern.findall(path.read_text()))
    return sorted(names)


def not_run(kernels: Sequence[str], launched: Sequence[str]) -> list[str]:
    """The kernels that no launch names; a launch is named by its whole signature."""
    words = {word for name in launched for word in re.findall(r"\w+", name)}
    return [kernel for kernel in kernels if kernel not in words]


def run(cases: Sequence[Case]) -> int:
    """Runs every case; the number of those that failed."""
    failures = 0
    for case in cases:
        try:
            case.check()
        except Exception as error:
            failures += 1
            print(f"FAIL {case.name}: {describe(error)}", flush=True)
    print(f"{len(cases) - failures} of {len(cases)} cases are right")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coverage", action="store_true", help="fail if a kernel of the sources never ran")
    parser.add_argument("--dry-run", action="store_true", help="the same calls on the CPU")
    args = parser.parse_args(argv)
    _library.require()
    torch.manual_seed(0)
    device = "cpu" if args.dry_run else "cuda"
    groups = (products, sampled_products, whole_mlps, initialisation)
    cases = [case for group in groups for case in group(device)]
    record = args.coverage and not args.dry_run
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) if record else contextlib.nullcontext() as profile:
        failures = run(cases)
        if not args.dry_run:
            torch.cuda.synchronize()
    major, minor = (0, 0) if args.dry_run else torch.cuda.get_device_capability()
    kernels = kernel_names(SOURCES, 10 * major + minor)
    missing = not_run(kernels, [event.key for event in profile.key_averages()]) if record else []
    print(f"{len(kernels)} kernels" + (f"; never run: {', '.join(missing) or 'none'}" if record else ""))
    return 1 if failures or missing else 0


if __name__ == "__main__":
    sys.exit(main())
