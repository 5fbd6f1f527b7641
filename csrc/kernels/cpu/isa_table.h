// Instantiates every kernel for the instruction set FIPS_ISA; cmake/CpuIsa.cmake sets the compiler
// flags.
#include "kernels/cpu/activation_impl.h"
#include "kernels/cpu/block_sparse_mm_stream.h"
#include "kernels/cpu/block_sparse_sddmm_impl.h"
#include "kernels/cpu/dense_fill_impl.h"
#include "kernels/cpu/skinny_mm_impl.h"

namespace fips::cpu::FIPS_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {
    mm_stream_tokens,
    mm_stream_element,
    mm_stream_pack,
    mm_stream,
    mm_panel,
    mm_max_group,
    mm_pack,
    mm_tiled,
    skinny_pack,
    skinny_mm,
    sddmm,
    fill,
    gather,
    activation_range<false>,
    activation_range<true>,
};

}  // namespace fips::cpu::FIPS_ISA
