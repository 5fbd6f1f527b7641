#include "torch/tf32.h"

#include <atomic>

namespace fips {
namespace {

std::atomic<int (*)()> tf32_query{nullptr};

}  // namespace

bool tf32_allowed() {
  int (*query)() = tf32_query.load();
  return query != nullptr && query() != 0;
}

}  // namespace fips

void fips_set_tf32_query(int (*query)()) { fips::tf32_query.store(query); }
