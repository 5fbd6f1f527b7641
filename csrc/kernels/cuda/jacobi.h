// Singular value decomposition of many small matrices at once, by one-sided Jacobi rotations
// (Hestenes 1958; Demmel, Veselic, SIAM J. Matrix Anal. Appl. 1992 for its accuracy). The
// eigenvectors of a positive definite L L^T are the right singular vectors of L^T, so the same
// kernels solve the symmetric eigenproblem, without `left` and with half the work.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "kernels/cuda/stream.h"

namespace fips::cuda {

// Above this the work per matrix asks for a solver that is rich in matrix products.
inline constexpr int64_t kJacobiMaxVectors = 512;

struct JacobiParams {
  int64_t batch = 0;
  int64_t vectors = 0,
          length = 0;              // each matrix; 1 <= vectors <= length, at most kJacobiMaxVectors
  DType dtype = DType::kFloat32;   // of everything: float32 or float64
  const void* matrices = nullptr;  // [batch, vectors, length] contiguous
  void* left = nullptr;    // [batch, vectors, vectors]: left singular vectors as ROWS, or null
  void* values = nullptr;  // [batch, vectors]: singular values, descending
  void* right = nullptr;   // [batch, vectors, length]: right singular vectors as rows
};

// Bytes that jacobi_svd needs, 16-byte aligned.
int64_t jacobi_workspace_bytes(const JacobiParams& params);

// matrix = left^T diag(values) right. Both factors have orthonormal rows whatever the rank: vectors
// of singular values below the rounding error of the largest are completed to a basis. Any finite
// scale is fine; for input with NaNs the result is unspecified.
void jacobi_svd(const JacobiParams& params, void* workspace, Stream stream);

}  // namespace fips::cuda
