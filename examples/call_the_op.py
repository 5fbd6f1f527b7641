"""Call the op from your own code: one MLP on a shared base, its gradients, and a compiled graph.

    python examples/call_the_op.py

`import fips_ext` registers `torch.ops.fips.*`; nothing else of the package is needed to run them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fips_ext  # noqa: F401 - registers the ops
from fips_ext import BlockSparse

WIDTH, RANK, HIDDEN = 256, 192, 1024


def sparse_factor(density: float = 0.5) -> BlockSparse:
    """A random V [RANK, HIDDEN] that stores half of its slots, one mask bit for each."""
    dense = torch.randn(RANK, HIDDEN) / (RANK * density) ** 0.5
    return BlockSparse.from_dense(dense, (32, 64), "bitmap", torch.rand(RANK, HIDDEN) < density)


def shared_mlp(x: Tensor, base: Tensor, up: BlockSparse, gate: BlockSparse, down: BlockSparse) -> Tensor:
    """``(silu(x U V_gate) * (x U V_up)) V_downᵀ Uᵀ``, ``[..., WIDTH] → [..., WIDTH]``."""
    biases = (None, None, None)
    slices = (up.tensors(), gate.tensors(), down.tensors())
    return torch.ops.fips.shared_mlp(x, base, None, *slices, *biases, HIDDEN, "silu", False)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    torch.manual_seed(0)
    base = (torch.randn(WIDTH, RANK) / WIDTH**0.5).requires_grad_()
    up, gate, down = sparse_factor(), sparse_factor(), sparse_factor()
    x = torch.randn(2, 16, WIDTH)

    y = shared_mlp(x, base, up, gate, down)
    z = x @ base
    expected = (F.silu(z @ gate.to_dense()) * (z @ up.to_dense())) @ down.to_dense().T @ base.T
    print(f"distance from dense products: {distance(y, expected):.1e}")

    (gradient,) = torch.autograd.grad(y.square().sum(), base)
    (wanted,) = torch.autograd.grad(expected.square().sum(), base)
    print(f"and of the gradient of U:     {distance(gradient, wanted):.1e}")

    compiled = torch.compile(shared_mlp, fullgraph=True, backend="aot_eager")
    print("compiled, the same:", torch.allclose(compiled(x, base, up, gate, down), y, atol=1e-5))


if __name__ == "__main__":
    main()
