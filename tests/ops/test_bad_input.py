"""Op tensors of the wrong dtype, shape or content: a clear error, never a crash or a stray read."""

from __future__ import annotations

import pytest
import torch

from fips_ext import BlockSparse

from .cases import random_mlp, random_slice
from .test_shared_mlp import flat_arguments

ops = torch.ops.fips
ROWS, COLS = 40, 70


def slice_tensors(encoding: str = "block", dtype=torch.float32) -> list[torch.Tensor]:
    return [t.clone() for t in random_slice(ROWS, COLS, (16, 32), encoding, dtype).tensors()]


def run(tensors, x=None, rows=ROWS, cols=COLS, bias=None):
    x = torch.randn(40, ROWS) if x is None else x
    return ops.block_sparse_mm(x, tensors, rows, cols, False, bias)


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize(("which", "name"), [(2, "row_idx"), (4, "col_idx"), (5, "block_id")])
@pytest.mark.parametrize("value", [-1, 2**31 - 1])
def test_index_out_of_range(encoding, which, name, value):
    tensors = slice_tensors(encoding)
    tensors[which][-1] = value
    with pytest.raises(ValueError, match=rf"v: {name}\[\d+\] is {value}; it must lie in \[0, \d+\)"):
        run(tensors)


@pytest.mark.parametrize(("which", "name"), [(1, "col_ptr"), (3, "row_ptr")])
def test_pointers_must_rise_from_zero_to_the_block_count(which, name):
    for position, value in ((0, 1), (-1, 10**6), (1, 10**6), (1, -5)):
        tensors = slice_tensors()
        tensors[which][position] = value
        with pytest.raises(ValueError, match=f"v: {name} must"):
            run(tensors)


def test_index_and_its_transpose_must_agree():
    for which in (4, 5):  # col_idx, block_id: in range, but of another block
        tensors = slice_tensors()
        tensors[which] = tensors[which].flip(0)
        with pytest.raises(ValueError, match=r"of the transposed index .* does not match"):
            run(tensors)
    tensors = slice_tensors()
    tensors[5].fill_(0)
    with pytest.raises(ValueError, match="does not match col_ptr and row_idx"):
        run(tensors)
    tensors = slice_tensors()
    tensors[2].fill_(0)
    with pytest.raises(ValueError, match=r"row_idx must increase strictly|does not match"):
        run(tensors)


def test_mask_must_agree_with_the_value_offsets():
    tensors = slice_tensors("bitmap")
    tensors[6].fill_(255)
    with pytest.raises(ValueError, match="mask of stored block 0 keeps 512 slots, but block_ptr gives it"):
        run(tensors)
    tensors = slice_tensors("bitmap")
    tensors[7][-1] += 1
    with pytest.raises(ValueError, match="block_ptr must start at 0 and end at"):
        run(tensors)


@pytest.mark.parametrize("encoding", ["block", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 9])
def test_few_tokens_skip_the_validation_but_never_a_stray_index(encoding, dtype, tokens):
    """Decoding does not read the whole index first: what it uses is checked where it is used."""
    x, h = torch.randn(tokens, ROWS, dtype=dtype), torch.randn(tokens, COLS, dtype=dtype)
    used = {False: (1, 2), True: (3, 4, 5)}  # col_ptr, row_idx; row_ptr, col_idx, block_id
    for transpose in (False, True):
        for which in (1, 2, 3, 4, 5, *((7,) if encoding == "bitmap" else ())):
            for value in (-1, 2**31 - 1):
                tensors = slice_tensors(encoding, dtype)
                tensors[which][1] = value
                if which in used[transpose] or which == 7:
                    with pytest.raises(ValueError, match=r"v: .*(must|match|but)"):
                        ops.block_sparse_mm(h if transpose else x, tensors, ROWS, COLS, transpose, None)
                else:
                    ops.block_sparse_mm(h if transpose else x, tensors, ROWS, COLS, transpose, None)
        if encoding == "bitmap":
            tensors = slice_tensors(encoding, dtype)
            tensors[6].fill_(255)  # more slots than values: none past the end may be read
            ops.block_sparse_mm(h if transpose else x, tensors, ROWS, COLS, transpose, None)


@pytest.mark.parametrize("which", [1, 2, 3, 4, 5])
def test_index_of_the_wrong_length_or_dtype(which):
    tensors = slice_tensors()
    tensors[which] = tensors[which][:-1]
    with pytest.raises(ValueError, match=r"v\.\w+: expected \d+ entries"):
        run(tensors)
    tensors = slice_tensors()
    tensors[which] = tensors[which].long()
    with pytest.raises(ValueError, match=r"v\.\w+: dtype is Long; expected Int"):
        run(tensors)


def test_block_edges_and_slice_length():
    tensors = slice_tensors()
    with pytest.raises(ValueError, match="a slice is 6 tensors"):
        run(tensors[:5])
    tensors[0] = tensors[0][:, :, :8].contiguous()
    with pytest.raises(ValueError, match="block is 8x32; each edge must be 16, 32, 64 or 128"):
        run(tensors)


def test_dtypes_shapes_and_devices():
    with pytest.raises(ValueError, match=r"v\.values: dtype is Float, but x is Double"):
        run(slice_tensors(), torch.randn(3, ROWS, dtype=torch.float64))
    tensors = slice_tensors()
    tensors[0] = tensors[0].int()
    with pytest.raises(ValueError, match="dtype Int is not supported"):
        run(tensors, torch.ones(3, ROWS, dtype=torch.int32))
    with pytest.raises(ValueError, match="x: last dimension is 41, but the slice is 40 x 70"):
        run(slice_tensors(), torch.randn(3, ROWS + 1))
    with pytest.raises(ValueError, match=r"bias: expected shape \[70\], got \[40\]"):
        run(slice_tensors(), bias=torch.randn(ROWS))
    with pytest.raises(ValueError, match="expected at least one dimension"):
        run(slice_tensors(), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"col_ptr: expected \d+ entries for shape"):
        run(slice_tensors(), torch.randn(3, ROWS), cols=1000)
    with pytest.raises(ValueError, match="must not be negative"):
        run(slice_tensors(), torch.randn(3, ROWS), rows=-1)


def test_mlp_arguments():
    mlp = random_mlp(True, True, False, True, "block", torch.float32)
    x = torch.randn(3, 24)
    arguments = list(flat_arguments(mlp))

    def expect(message, position=None, value=None, x=x):
        changed = list(arguments)
        if position is not None:
            changed[position] = value
        with pytest.raises(ValueError, match=message):
            ops.shared_mlp(x, *changed)

    expect(r"base: expected shape \[24, r\] to match x, got \[18, 24\]", 0, mlp["base"].t())
    expect(r"base_out: dtype is Double, but x is Float", 1, mlp["base_out"].double())
    expect("up: a slice is 6 tensors", 2, arguments[2][:3])
    expect("activation: got 'swish'; allowed are identity, gelu", 9, "swish")
    expect(r"down_bias: expected shape \[24\]", 7, torch.randn(25))
    expect("gate_bias: given without gate", 3, None)
    expect(r"base: expected shape \[25, r\]", x=torch.randn(3, 25))
    with pytest.raises(ValueError, match="target: shape is"):
        ops.reconstruction_loss(x, torch.randn(4, 24), None, 1.0, *arguments)
    with pytest.raises(ValueError, match="token_weight: expected float32 with one entry for each of the 3"):
        ops.reconstruction_loss(x, x, torch.ones(4), 1.0, *arguments)


def test_initialisation_arguments():
    w = torch.randn(2, 10, 12)
    for call, message in (
        (lambda: ops.batched_rsvd(w, 11), r"rank: got 11; it must lie in \[1, 10\]"),
        (lambda: ops.batched_rsvd(w[0], 2), r"w: expected \[batch, m, n\], got \[10, 12\]"),
        (lambda: ops.batched_rsvd(w, 2, power_iters=-1), "power_iters: got -1"),
        (lambda: ops.batched_gram_eigh(w, -1.0), "damping: got -1"),
        (lambda: ops.gram_update(torch.zeros(3, 3), w), r"gram: expected shape \[12, 12\]"),
        (lambda: ops.gram_update(torch.zeros(12, 12).half(), w), "summed in float32 or float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_layout_construction():
    dense = torch.randn(20, 30)
    with pytest.raises(ValueError, match=r"block: got \(8, 16\); each edge"):
        BlockSparse.from_dense(dense, (8, 16))
    with pytest.raises(ValueError, match="encoding: got 'coo'"):
        BlockSparse.from_dense(dense, (16, 16), "coo")
    with pytest.raises(ValueError, match="mask: expected bool"):
        BlockSparse.from_dense(dense, (16, 16), "bitmap", torch.ones(20, 30))
    v = BlockSparse.from_dense(dense, (16, 16), "bitmap")
    with pytest.raises(ValueError, match="row_idx: must increase strictly"):
        BlockSparse.from_index(20, 30, (16, 16), v.values, v.col_ptr, v.row_idx.flip(0), v.mask)
    with pytest.raises(ValueError, match=r"row_idx: entries must lie in \[0, 2\)"):
        BlockSparse.from_index(20, 30, (16, 16), v.values, v.col_ptr, v.row_idx + 1, v.mask)
    with pytest.raises(ValueError, match="values: expected shape"):
        BlockSparse.from_index(20, 30, (16, 16), v.values[1:], v.col_ptr, v.row_idx, v.mask)
    ragged = BlockSparse.from_dense(dense, (16, 16))
    values = ragged.values.clone()
    values[-1, -1, -1] = float("nan")
    with pytest.raises(ValueError, match=r"slots in the padding .* must be zero"):
        BlockSparse.from_index(20, 30, (16, 16), values, ragged.col_ptr, ragged.row_idx)
