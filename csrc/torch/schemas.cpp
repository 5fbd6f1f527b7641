// Every op of torch.ops.fips, in one list. `Tensor[] v` is one BlockSparse slice: values, col_ptr,
// row_idx, row_ptr, col_idx, block_id, and for the bitmap encoding mask, block_ptr
// (docs/format.md). `rows, cols` is its logical shape (r, n). Ops with a slice have no default
// arguments: the dispatcher drops arguments that equal their default, and torch.library's autograd
// for tensor lists then miscounts the gradients. Definitions of the mathematics:
// python/fips_ext/reference.py.
#include <torch/csrc/stable/library.h>

#if defined(FIPS_HOST_EMULATION)
STABLE_TORCH_LIBRARY(fips_emulated, m) {  // torch/cuda_scope.h
#else
STABLE_TORCH_LIBRARY(fips, m) {
#endif
  // x V (+ bias), or x V^T (+ bias) with `transpose`: [..., r] -> [..., n] or [..., n] -> [..., r].
  m.def(
      "block_sparse_mm(Tensor x, Tensor[] v, int rows, int cols, bool transpose, Tensor? bias) "
      "-> Tensor");

  // a^T b on the stored slots of v, in the shape of its values; a [..., r], b [..., n]. v[0] is not
  // read.
  m.def("block_sparse_sddmm(Tensor a, Tensor b, Tensor[] v, int rows, int cols) -> Tensor");

  // The whole MLP. base [d, r]; base_out [d, r'] or None for base; with `identity` both read [U,
  // I].
  m.def(
      "shared_mlp(Tensor x, Tensor base, Tensor? base_out, Tensor[] up, Tensor[]? gate, Tensor[] "
      "down, "
      "Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, int hidden, str activation, "
      "bool identity) -> Tensor");

  // Gradients of x, base, base_out, up, gate, down values and the three biases; absent ones are
  // empty.
  m.def(
      "shared_mlp_backward(Tensor grad_y, Tensor x, Tensor base, Tensor? base_out, Tensor[] up, "
      "Tensor[]? gate, Tensor[] down, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, int "
      "hidden, "
      "str activation, bool identity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");

  // scale * sum(token_weight * (shared_mlp(x) - target)^2) and the gradients of base, base_out, up,
  // gate, down values and the three biases, made chunk by chunk over tokens in one pass; loss and
  // gradients in float32 (float64 for float64).
  m.def(
      "reconstruction_loss(Tensor x, Tensor target, Tensor? token_weight, float scale, Tensor "
      "base, Tensor? base_out, "
      "Tensor[] up, "
      "Tensor[]? gate, Tensor[] down, Tensor? up_bias, Tensor? gate_bias, Tensor? down_bias, int "
      "hidden, "
      "str activation, bool identity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");

  // Randomised SVD of each matrix of w [B, m, n]: U [B, m, k], S [B, k], Vh [B, k, n]; a pure
  // function of w and seed (Halko, Martinsson, Tropp 2011).
  m.def(
      "batched_rsvd(Tensor w, int rank, int oversample=8, int power_iters=2, int seed=0) "
      "-> (Tensor, Tensor, Tensor)");

  // Eigenvalues (descending) and eigenvectors of w w^T + damping * mean(diag) * I for each matrix
  // of w [B, m, n].
  m.def("batched_gram_eigh(Tensor w, float damping=0.0) -> (Tensor, Tensor)");

  // gram += x^T x over all tokens; gram [d, d] float32 or float64, x [..., d] of any floating type.
  m.def("gram_update(Tensor(a!) gram, Tensor x) -> ()");

  // Version, instruction sets, CUDA architectures and compiler, as JSON.
  m.def("build_info() -> str");
}
