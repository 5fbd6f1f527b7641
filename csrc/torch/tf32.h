// Whether float32 products on a GPU may run in TF32. torch's switch has no stable C interface, so
// Python hands in a function that reads it (python/fips_ext/_tf32.py).
#pragma once

namespace fips {

bool tf32_allowed();  // false until a function is set

}  // namespace fips

extern "C" __attribute__((visibility("default"))) void fips_set_tf32_query(int (*query)());
