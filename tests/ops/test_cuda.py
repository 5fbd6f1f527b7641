"""The CUDA kernels against the float64 oracle. Needs a GPU; the same kernels run emulated on any machine in
tests/cpp/test_cuda_emulated.cpp."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fips_ext import BlockSparse, functional, reference

from ..devices import CudaOps, reason_without_gpu
from .cases import (
    ENCODINGS,
    TOLERANCE,
    as_double,
    leaves,
    random_mlp,
    random_slice,
    relative_error,
    with_leaves,
)
from .test_shared_mlp import CHAIN_TOLERANCE, flat_arguments, in_double

_skip = reason_without_gpu()
pytestmark = pytest.mark.skipif(_skip is not None, reason=_skip or "")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EDGES = (16, 32, 64, 128)


to_cuda = CudaOps(torch.ops.fips, "cuda").put


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).cuda()


def check(v: BlockSparse, x: Tensor, transpose: bool, bias: Tensor | None = None) -> Tensor:
    """Runs the op, compares it with the oracle and returns the result."""
    y = functional.block_sparse_mm(x, v, transpose, bias)
    expected = reference.block_sparse_mm(
        x.double(), as_double(v), transpose, None if bias is None else bias.double()
    )
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert relative_error(y, expected) <= TOLERANCE[x.dtype]
    return y


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_and_token_count(dtype, encoding, transpose):
    for bk in EDGES:
        for bn in EDGES:
            v = to_cuda(random_slice(2 * bk + 10, 3 * bn + 7, (bk, bn), encoding, dtype))
            bias = randn(v.rows if transpose else v.cols, dtype=dtype, seed=2)
            for tokens in (0, 1, 7, 130):
                x = randn(tokens, v.cols if transpose else v.rows, dtype=dtype)
                check(v, x, transpose, bias if tokens != 7 else None)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [40, 1000, 5000])
def test_every_tile_height(dtype, transpose, tokens):
    v = to_cuda(random_slice(776, 3080, (64, 64), "block", dtype))
    check(v, randn(tokens, v.cols if transpose else v.rows, dtype=dtype), transpose)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_inputs(dtype, encoding):
    v = to_cuda(random_slice(101, 75, (32, 16), encoding, dtype))
    wide = randn(33, 260, dtype=dtype)
    check(v, wide[:, 3:104], False)  # rows far apart, unaligned
    check(v, wide[:, 8:109], False)
    check(v, wide[:, ::2][:, :101], False)  # features apart: copied
    check(v, randn(101, 9, dtype=dtype).t(), False)
    check(v, randn(2, 3, 5, 75, dtype=dtype), True)
    check(v, randn(101, dtype=dtype), False)
    check(v, randn(1, 101, dtype=dtype).expand(6, 101), False)
    shifted = torch.empty(v.values.numel() + 1, dtype=dtype, device="cuda")[1:].view(v.values.shape)
    check(v.with_values(shifted.copy_(v.values)), randn(5, 101, dtype=dtype), False)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_empty_slices(encoding):
    dense = torch.zeros(48, 80, dtype=torch.bfloat16)
    v = to_cuda(BlockSparse.from_dense(dense, (16, 16), encoding))
    bias = randn(80, dtype=torch.bfloat16)
    y = functional.block_sparse_mm(randn(5, 48, dtype=torch.bfloat16), v, False, bias)
    assert torch.equal(y, bias.expand(5, 80))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_no_larger_than_the_vendors(dtype):
    v = to_cuda(random_slice(1024, 2048, (64, 64), "block", dtype))
    x = randn(512, 1024, dtype=dtype)
    expected = x.double() @ as_double(v).to_dense()
    ours = relative_error(functional.block_sparse_mm(x, v), expected)
    vendors = relative_error(x @ v.to_dense(), expected)
    if dtype == torch.float32:  # two orders of sums differ by chance
        assert ours <= TOLERANCE[dtype]
    else:
        assert ours <= 1.1 * vendors + 1e-7


def test_same_result_every_time():
    v = to_cuda(random_slice(768, 3072, (64, 64), "block", torch.bfloat16))
    for tokens in (4, 700):
        x = randn(tokens, 768, dtype=torch.bfloat16)
        first = functional.block_sparse_mm(x, v)
        assert all(torch.equal(first, functional.block_sparse_mm(x, v)) for _ in range(5))


def test_runs_on_the_current_stream():
    v = to_cuda(random_slice(768, 3072, (64, 64), "block", torch.bfloat16))
    x = randn(256, 768, dtype=torch.bfloat16)
    want = functional.block_sparse_mm(x, v)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)  # a kernel on the wrong stream would read the zeros
        late.copy_(x)
        got = functional.block_sparse_mm(late, v)
    stream.synchronize()
    assert torch.equal(got, want)


def test_captured_in_a_graph():
    v = to_cuda(random_slice(768, 3072, (64, 64), "block", torch.bfloat16))
    x = randn(8, 768, dtype=torch.bfloat16)
    functional.block_sparse_mm(functional.block_sparse_mm(x, v), v, True)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.block_sparse_mm(x, v)
        back = functional.block_sparse_mm(y, v, True)
    x.copy_(randn(8, 768, dtype=torch.bfloat16, seed=3))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, functional.block_sparse_mm(x, v))
    assert torch.equal(back, functional.block_sparse_mm(y, v, True))


def test_more_than_two_to_the_31_elements():
    tokens, stride = 2**21, 1040
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    v = to_cuda(random_slice(32, 16, (16, 16), "block", torch.bfloat16))
    x = torch.zeros(tokens, stride, dtype=torch.bfloat16, device="cuda")[:, :32]
    x[-50:] = randn(50, 32, dtype=torch.bfloat16)
    y = functional.block_sparse_mm(x, v)
    want = reference.block_sparse_mm(x[-50:].double(), as_double(v))
    assert relative_error(y[-50:], want) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tokens", [9, 300])
@pytest.mark.parametrize("block", [(32, 32), (64, 64)], ids=str)
def test_broken_indices_are_skipped(encoding, transpose, tokens, block):
    v = to_cuda(random_slice(200, 300, block, encoding, torch.bfloat16))
    far = 2**31 - 1
    for name in ("row_idx", "col_idx", "block_id"):
        getattr(v, name)[:3] = torch.tensor([far, -1, 10**6], dtype=torch.int32)
    for name in ("col_ptr", "row_ptr"):
        getattr(v, name)[0] = -far
        getattr(v, name)[-1] = far
    if v.block_ptr is not None:
        v.block_ptr[1:4] = torch.tensor([far, -far, 10**8], dtype=torch.int32)
    x = randn(tokens, 300 if transpose else 200, dtype=torch.bfloat16)
    y = functional.block_sparse_mm(x, v, transpose)
    torch.cuda.synchronize()
    assert torch.isfinite(y).all()


def test_wrong_arguments_are_refused():
    v = to_cuda(random_slice(64, 64, (16, 16), "block", torch.float32))
    x = randn(4, 64, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        functional.block_sparse_mm(x, v, False, torch.zeros(64))
    with pytest.raises((ValueError, RuntimeError), match="float64"):
        functional.block_sparse_mm(x.double(), as_double(v))
    with pytest.raises((ValueError, RuntimeError), match="last dimension"):
        functional.block_sparse_mm(x[:, :60], v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "rank", "hidden"), [(192, 96, 768), (768, 384, 3072)])
@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp_of_real_widths(dtype, width, rank, hidden, tokens, gated):
    mlp = random_mlp(gated, True, False, True, "block", dtype, width, hidden, rank, "silu")
    x = randn(tokens, width, dtype=dtype)
    y = functional.shared_mlp(x, **to_cuda(mlp))
    assert relative_error(y.cpu(), reference.shared_mlp(x.cpu().double(), **in_double(mlp))) < (
        2 * CHAIN_TOLERANCE[dtype]
    )


@pytest.mark.parametrize("block", [(64, 64), (64, 128), (128, 64), (32, 32)], ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tokens", [8, 300, 2500])
def test_mlp_with_every_kind_of_block(block, encoding, tokens):
    dtype = torch.bfloat16
    mlp = random_mlp(True, True, False, False, encoding, dtype, 520, 1100, 300, "silu", block)
    x, grad = randn(tokens, 520, dtype=dtype), randn(tokens, 520, dtype=dtype, seed=2)
    y = functional.shared_mlp(x, **to_cuda(mlp))
    wide = in_double(mlp)
    exact = {name: t.clone().requires_grad_() for name, t in leaves(wide).items()}
    data = x.cpu().double().requires_grad_()
    expected = reference.shared_mlp(data, **with_leaves(wide, exact))
    assert relative_error(y.cpu(), expected.detach()) < 2 * CHAIN_TOLERANCE[dtype]
    wanted = torch.autograd.grad(expected, [data, *exact.values()], grad.cpu().double())
    found = torch.ops.fips.shared_mlp_backward(grad, x, *to_cuda(flat_arguments(mlp)))
    by_name = dict(zip(("x", "base", "base_out", "up", "gate", "down"), found, strict=False))
    for name, want in zip(["x", *exact], wanted, strict=True):
        if name in by_name:
            assert relative_error(by_name[name].cpu(), want) < 3 * CHAIN_TOLERANCE[dtype], name


@pytest.mark.parametrize(("block", "kept"), [((128, 128), 0.2), ((32, 32), 0.1), ((64, 64), 0.9)], ids=str)
def test_sampled_product_of_many_tokens(block, kept):
    """Several ranges of tokens, and the dense product where most blocks are stored."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(-(-700 // block[0]), -(-900 // block[1]), generator=generator) < kept
    keep = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:700, :900]
    v = to_cuda(BlockSparse.from_dense(torch.zeros(700, 900, dtype=torch.bfloat16), block, "block", keep))
    a = randn(6000, 700, dtype=torch.bfloat16)
    b = randn(6000, 900, dtype=torch.bfloat16, seed=2)
    got = functional.block_sparse_sddmm(a, b, v)
    expected = reference.block_sparse_sddmm(a.double(), b.double(), as_double(v))
    assert relative_error(got, expected) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(got, functional.block_sparse_sddmm(a, b, v))


def test_first_call_of_a_thread():
    """A thread that has not used CUDA yet, as one of autograd's may be."""
    v = to_cuda(random_slice(256, 512, (64, 64), "block", torch.bfloat16))
    x = randn(300, 256, dtype=torch.bfloat16)
    want = functional.block_sparse_mm(x, v)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(functional.block_sparse_mm, x, v).result()
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("width", [64, 1024])
def test_whole_mlp_in_a_graph_and_on_a_stream(tokens, width):
    mlp = to_cuda(random_mlp(True, True, False, False, "block", torch.bfloat16, width, 2 * width, width // 2))
    x = randn(tokens, width, dtype=torch.bfloat16)
    functional.shared_mlp(x, **mlp)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.shared_mlp(x, **mlp)
    for seed in (3, 4):
        x.copy_(randn(tokens, width, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, functional.shared_mlp(x, **mlp))


def test_opcheck_and_autograd():
    mlp = to_cuda(random_mlp(True, True, False, False, "block", torch.float32))
    x = randn(40, 24, dtype=torch.float32).requires_grad_()
    inputs = {name: t.clone().requires_grad_() for name, t in leaves(mlp).items()}
    torch.library.opcheck(torch.ops.fips.shared_mlp.default, (x, *flat_arguments(with_leaves(mlp, inputs))))
    y = functional.shared_mlp(x, **with_leaves(mlp, inputs))
    found = torch.autograd.grad(y, [x, *inputs.values()], torch.ones_like(y))
    wide = in_double(mlp)
    exact = {name: t.clone().requires_grad_() for name, t in leaves(wide).items()}
    data = x.detach().double().requires_grad_()
    expected = reference.shared_mlp(data, **with_leaves(wide, exact))
    for got, want in zip(
        found, torch.autograd.grad(expected, [data, *exact.values()], torch.ones_like(expected)), strict=True
    ):
        assert relative_error(got, want) < 2 * CHAIN_TOLERANCE[torch.float32]


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    mlp = CudaOps(torch.ops.fips, "cuda:1").put(random_mlp(True, True, False, True, "block", torch.bfloat16))
    x = randn(8, 24, dtype=torch.bfloat16).to("cuda:1")
    assert functional.shared_mlp(x, **mlp).device == x.device
