#include "torch/device_cuda.h"
#include "torch/device_ops.h"

FIPS_CUDA_LIBRARY(m) { fips::DeviceOps<fips::CudaDevice>::register_in(m); }
