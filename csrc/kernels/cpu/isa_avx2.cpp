#define FIPS_ISA avx2
#include "kernels/cpu/isa_table.h"
