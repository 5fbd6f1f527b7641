#include "torch/device_cpu.h"
#include "torch/device_ops.h"

STABLE_TORCH_LIBRARY_IMPL(fips, CPU, m) { fips::DeviceOps<fips::CpuDevice>::register_in(m); }
