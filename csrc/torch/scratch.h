// Scratch memory of a thread: grows to the largest request and stays, so that decoding allocates
// nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "core/huge_pages.h"
#include "core/math.h"

namespace fips {

// At least `bytes` bytes, 64-byte aligned, any content; the previous result of this thread is void.
inline char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(
        static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
    size = bytes;
    advise_huge_pages(memory.get(), size);
  }
  return memory.get();
}

}  // namespace fips
