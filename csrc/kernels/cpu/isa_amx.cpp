#define FIPS_ISA amx
#include "kernels/cpu/isa_table.h"
