// The CUDA stream type without CUDA's headers, so that the same sources compile for host emulation.
#pragma once

struct CUstream_st;

namespace fips::cuda {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace fips::cuda
