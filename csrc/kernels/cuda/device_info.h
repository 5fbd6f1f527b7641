// What a launch needs to know about the current device.
#pragma once

namespace fips::cuda {

struct DeviceInfo {
  int sm_count;
  int capability;        // 10 * major + minor
  int max_shared_bytes;  // dynamic shared memory that one thread block may ask for
};

// Cheap: attributes the runtime keeps, no synchronisation. Emulated: emulation::device().
DeviceInfo current_device();

}  // namespace fips::cuda
