#define FIPS_ISA scalar
#include "kernels/cpu/isa_table.h"
