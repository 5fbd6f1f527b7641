"""The layout: round trips, the byte account, and agreement of the Python and the C++ packers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ext import BlockSparse, _host
from fips_ext.layout import pack_bits, unpack_bits

SIZES = st.integers(1, 150)
EDGES = st.sampled_from([16, 32, 64, 128])


def random_dense(rows: int, cols: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=generator)
    return (dense * (torch.rand(rows, cols, generator=generator) < 0.3)).to(dtype)


@settings(max_examples=80, deadline=None)
@given(rows=SIZES, cols=SIZES, bk=EDGES, bn=EDGES, encoding=st.sampled_from(["block", "bitmap"]))
def test_round_trip(rows, cols, bk, bn, encoding):
    dense = random_dense(rows, cols, rows + cols)
    v = BlockSparse.from_dense(dense, (bk, bn), encoding)
    assert torch.equal(v.to_dense(), dense)
    again = BlockSparse.from_index(rows, cols, v.block, v.values, v.col_ptr, v.row_idx, v.mask)
    for a, b in zip(v.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(rows=SIZES, cols=SIZES, bk=EDGES, bn=EDGES, encoding=st.sampled_from(["block", "bitmap"]))
def test_host_packer_agrees(rows, cols, bk, bn, encoding):
    dense = random_dense(rows, cols, rows * cols)
    v = BlockSparse.from_dense(dense, (bk, bn), encoding)
    packed = _host.pack(dense.numpy(), (dense != 0).numpy(), (bk, bn), encoding)
    names = ["values", "col_ptr", "row_idx", "row_ptr", "col_idx", "block_id", "mask", "block_ptr"]
    for name, tensor in zip(names, v.tensors(), strict=False):
        np.testing.assert_array_equal(packed[name], tensor.numpy(), err_msg=name)
    assert packed["stored_bytes"] == v.nbytes()
    np.testing.assert_array_equal(_host.unpack(packed), dense.numpy())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_host_packer_takes_any_element_size(dtype):
    dense = random_dense(40, 50, 0).numpy().astype(dtype)
    packed = _host.pack(dense, dense != 0, (16, 32), "bitmap")
    assert packed["values"].dtype == dtype
    np.testing.assert_array_equal(_host.unpack(packed), dense)


def test_host_refuses_inconsistent_slices():
    dense = random_dense(40, 50, 0).numpy()
    good = _host.pack(dense, dense != 0, (16, 16), "bitmap")
    for change, message in (
        ({"row_idx": good["row_idx"] + 9}, "row_idx: entry"),
        ({"row_idx": np.zeros_like(good["row_idx"])}, "must increase strictly"),
        ({"col_ptr": good["col_ptr"][:-1]}, "col_ptr: must hold"),
        ({"mask": good["mask"][:-1]}, "mask: must hold"),
        ({"values": good["values"][:-1]}, "values: the mask keeps"),
        ({"block": (7, 16)}, "block: got 7x16"),
        ({"col_ptr": np.array([0, 40, 41, 42], dtype=np.int32)}, "col_ptr: must hold"),
        ({"row_idx": good["row_idx"].astype(np.int64) + 2**32}, "row_idx: entry 0 .* out of range"),
        ({"encoding": "bitmpa"}, "encoding: got 'bitmpa'"),
        ({"values": np.array([None])}, "values: expected floats or integers"),
        ({"values": np.zeros(3, dtype="V0")}, "values: expected floats or integers"),
    ):
        with pytest.raises(ValueError, match=message):
            _host.unpack({**good, **change})
    with pytest.raises(ValueError, match="encoding: got 'csr'"):
        _host.pack(dense, dense != 0, (16, 16), "csr")
    for bad in (dense.astype(np.int8), dense.astype(object), dense.astype(np.complex64)):
        with pytest.raises(ValueError, match="dense: expected floats or integers of 2, 4 or 8 bytes"):
            _host.pack(bad, dense != 0, (16, 16), "block")


def test_bits_round_trip():
    bits = torch.rand(5, 7, 64) < 0.5
    assert torch.equal(unpack_bits(pack_bits(bits)), bits)
    assert int(pack_bits(torch.tensor([[True] + [False] * 15]))[0, 0]) == 1  # least significant bit first


def test_kept_zeros_stay_stored_in_a_bitmap():
    dense = torch.zeros(16, 16)
    v = BlockSparse.from_dense(dense, (16, 16), "bitmap", torch.ones(16, 16, dtype=torch.bool))
    assert v.values.numel() == 256


def test_to_dense_is_differentiable():
    v = BlockSparse.from_dense(random_dense(20, 30, 1), (16, 16), "bitmap")
    values = v.values.clone().requires_grad_()
    weights = torch.randn(20, 30)
    (v.with_values(values).to_dense() * weights).sum().backward()
    assert torch.equal(
        values.grad, BlockSparse.from_dense(weights, (16, 16), "bitmap", v.to_dense() != 0).values
    )
