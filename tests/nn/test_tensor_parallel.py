"""Runs of block columns: each is the slice of those columns, and they are dealt out evenly. See also
tests/test_distributed.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fips_ext.errors import InvalidArgument
from fips_ext.layout import BlockSparse
from fips_ext.nn.tensor_parallel import dealt_out


def random_slice(rows: int, cols: int, encoding: str, bits: int | None, seed: int) -> BlockSparse:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=generator) < torch.rand(1, cols, generator=generator) ** 3
    dense = torch.randn(rows, cols, generator=generator) * keep
    v = BlockSparse.from_dense(dense, (16, 16), encoding)
    return v if bits is None else v.quantised(bits)


@settings(deadline=None)
@given(
    st.integers(1, 50),
    st.integers(1, 90),
    st.sampled_from(["block", "bitmap"]),
    st.sampled_from([None, 8, 4]),
    st.integers(0, 9),
    st.data(),
)
def test_block_columns_are_those_of_the_dense_matrix(rows, cols, encoding, bits, seed, data) -> None:
    v = random_slice(rows, cols, encoding, bits, seed)
    count = -(-cols // 16)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    part = v.block_columns(start, stop)
    assert part.encoding == encoding
    assert part.bits == bits
    assert torch.equal(part.to_dense(), v.to_dense()[:, start * 16 : stop * 16])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 1), (0, 6)])
def test_no_such_block_columns(start, stop) -> None:
    with pytest.raises(InvalidArgument, match="expected a run of the 5 block columns"):
        random_slice(20, 70, "block", None, 0).block_columns(start, stop)


@given(st.integers(1, 12), st.integers(0, 9))
def test_every_device_gets_columns(size, seed) -> None:
    slices = [random_slice(64, 16 * 12, "block", None, seed + i) for i in range(3)]
    bounds = dealt_out(slices, size)
    assert bounds[0] == 0
    assert bounds[-1] == 12
    assert all(a < b for a, b in itertools.pairwise(bounds))
    stored = sum(v.col_ptr.diff() for v in slices)
    shares = [int(stored[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    assert max(shares) <= int(stored.sum()) / size + 2 * int(stored.max())


def test_more_devices_than_columns() -> None:
    with pytest.raises(InvalidArgument, match="13 devices for an MLP of 12 block columns"):
        dealt_out([random_slice(16, 16 * 12, "block", None, 0)], 13)
