// Tests that run once on every instruction set of this processor.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/cpu/dispatch.h"

namespace fips::testing {

class OnEveryIsa : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > cpu::detect_isa()) {
      GTEST_SKIP() << "this processor lacks " << cpu::isa_name(GetParam());
    }
    setenv("FIPS_CPU_CAPABILITY", cpu::isa_name(GetParam()), 1);
  }
  void TearDown() override { unsetenv("FIPS_CPU_CAPABILITY"); }
};

#define FIPS_INSTANTIATE_ON_EVERY_ISA(suite)                                   \
  INSTANTIATE_TEST_SUITE_P(                                                    \
      EveryIsa, suite,                                                         \
      ::testing::Values(cpu::Isa::kScalar, cpu::Isa::kAvx2, cpu::Isa::kAvx512, \
                        cpu::Isa::kAvx512Bf16, cpu::Isa::kAmx),                \
      [](const auto& instance) { return cpu::isa_name(instance.param); })

}  // namespace fips::testing
