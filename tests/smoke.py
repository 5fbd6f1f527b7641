"""What an installed package must do anywhere, without the source tree: run with the installed interpreter."""

import importlib.metadata
import json

import torch

import fips_ext
from fips_ext import BlockSparse, _host, functional

print(torch.ops.fips.shared_mlp)
info = json.loads(torch.ops.fips.build_info())
print(json.dumps(info))
assert info["version"] == fips_ext.__version__ == importlib.metadata.version("fips_ext") == _host.version

dense = torch.randn(40, 60)
v = BlockSparse.from_dense(dense, (16, 32), "bitmap", torch.rand(40, 60) < 0.5)
x = torch.randn(3, 40)
assert torch.allclose(functional.block_sparse_mm(x, v), x @ v.to_dense(), atol=1e-4)
