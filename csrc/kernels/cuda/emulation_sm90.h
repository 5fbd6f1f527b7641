// ptx_sm90.cuh on the CPU. Everything asynchronous happens as late as the program allows: tensor
// loads when every thread is stuck (their target is poisoned from the start), wgmma at the wait
// that names its group (its accumulators are NaN until then), tensor stores likewise. Misuse that
// hardware would answer with wrong numbers throws.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "core/check.h"
#include "kernels/cuda/emulation.h"
#include "kernels/cuda/sm90_layout.h"
#include "kernels/cuda/tensor_map.h"

#define FIPS_GRID_CONSTANT

namespace fips::cuda {
namespace emulation {

struct Mbarrier {
  int arrivals, pending;
  int64_t bytes = 0;   // announced and not yet come
  int64_t phases = 0;  // completed
  bool fenced = false;
};

// A product that has been issued. Its sums live here until it is done, as in flight they may not be
// read from the registers.
struct PendingMma {
  float* registers;
  int registers_count;
  uint64_t a, b;
  MmaMajor major_a, major_b;
  bool accumulate;
  float (*decode)(uint16_t);
};

struct PendingStore {
  TensorMap map;
  int column, row;
  const unsigned char* source;
};

struct AccumulatorInFlight {
  std::vector<float> sums;
  int products = 0;
};

struct Sm90Thread {
  std::vector<PendingMma> open_mma;
  std::deque<std::vector<PendingMma>> mma_groups;
  std::map<float*, AccumulatorInFlight> in_flight;
  bool mma_fenced = false;
  size_t mma_issued = 0;
  std::vector<PendingStore> open_stores;
  std::deque<std::vector<PendingStore>> store_groups;
  int registers;
};

struct MmaSignature {
  uint64_t a, b;
  int n;
  bool accumulate;
};

class Sm90Block : public BlockExtension {
 public:
  explicit Sm90Block(Block& block) : block_(block), threads_(block.threads()) {
    for (Sm90Thread& thread : threads_) {
      thread.registers = 65536 / block.threads() / 8 * 8;
    }
    issued_.resize(ceil_div(block.threads(), kWarpgroupSize));
  }

  static Sm90Block& current() { return Block::current()->extension<Sm90Block>(); }

  Sm90Thread& thread() { return threads_[block_.thread]; }

  void finish() override {
    for (const Sm90Thread& thread : threads_) {
      FIPS_CHECK(thread.store_groups.empty() && thread.open_stores.empty(),
                 "emulation: a block ends while a tensor store has yet to read its shared memory");
      FIPS_CHECK(thread.mma_groups.empty() && thread.open_mma.empty(),
                 "emulation: a block ends with a wgmma that nobody waited for");
    }
    for (size_t i = 0; i < threads_.size(); ++i) {
      FIPS_CHECK(threads_[i].mma_issued == issued_[i / kWarpgroupSize].size(),
                 "emulation: a wgmma was not issued by every thread of its warpgroup");
    }
  }

  std::string explain_deadlock() const override {
    std::string text;
    for (const auto& [address, barrier] : barriers_) {
      if (barrier.bytes != 0) {
        text += "; an mbarrier still expects " + std::to_string(barrier.bytes) + " bytes";
      }
    }
    return text;
  }

  // ---- mbarriers

  void init(SharedAddress address, int arrivals) {
    FIPS_CHECK(address % 8 == 0 && arrivals > 0, "emulation: mbarrier at an unaligned address");
    barriers_[address] = {arrivals, arrivals};
    memcpy(reinterpret_cast<void*>(address), &kBarrierMark, sizeof kBarrierMark);
  }

  void fence_inits() {
    for (auto& [address, barrier] : barriers_) {
      barrier.fenced = true;
    }
  }

  Mbarrier& find(SharedAddress address) {
    const auto found = barriers_.find(address);
    FIPS_CHECK(found != barriers_.end(), "emulation: use of an mbarrier that was not initialised");
    FIPS_CHECK(memcmp(reinterpret_cast<void*>(address), &kBarrierMark, sizeof kBarrierMark) == 0,
               "emulation: something overwrote an mbarrier");
    return found->second;
  }

  void arrive(SharedAddress address, int64_t bytes) {
    Mbarrier& barrier = find(address);
    FIPS_CHECK(--barrier.pending >= 0, "emulation: more arrivals than the mbarrier counts");
    barrier.bytes += bytes;
    complete_if_done(barrier);
  }

  void bytes_came(SharedAddress address, int64_t bytes) {
    Mbarrier& barrier = find(address);
    barrier.bytes -= bytes;
    FIPS_CHECK(barrier.bytes >= 0, "emulation: ", -barrier.bytes,
               " bytes more came than arrive.expect_tx announced");
    complete_if_done(barrier);
  }

  void wait(SharedAddress address, uint32_t parity) {
    FIPS_CHECK(parity <= 1, "emulation: parity is ", parity);
    const Mbarrier& barrier = find(address);
    block_.wait_until([&] { return (barrier.phases & 1) != static_cast<int64_t>(parity); });
  }

  // ---- named barriers, registers

  void named_barrier(int id, int count) {
    FIPS_CHECK(id >= 1 && id <= 15, "emulation: named barrier ", id, "; allowed are 1 to 15");
    FIPS_CHECK(count > 0 && count % kLanes == 0 && count <= block_.threads(),
               "emulation: a named barrier of ", count, " threads");
    Meeting& meeting = named_[id];
    FIPS_CHECK(meeting.arrived == 0 || meeting.size == count,
               "emulation: threads meet at a named barrier with different counts");
    meeting.size = count;
    block_.meet(meeting);
  }

  void set_registers(int count, bool take) {
    int& mine = thread().registers;
    FIPS_CHECK(count >= 24 && count <= 256 && count % 8 == 0 && (count >= mine) == take,
               "emulation: setmaxnreg from ", mine, " to ", count);
    block_.wait_until([&] { return free_registers_ >= count - mine; });
    free_registers_ -= count - mine;
    mine = count;
  }

  // ---- tensor copies

  void load(SharedAddress target, const TensorMap& map, int column, int row,
            SharedAddress barrier) {
    FIPS_CHECK(target % kSwizzlePatternBytes == 0,
               "emulation: a tensor load to shared memory that is not aligned to 1024 bytes");
    FIPS_CHECK(find(barrier).fenced, "emulation: a tensor load on an mbarrier without init fence");
    auto* to = reinterpret_cast<unsigned char*>(target);
    const int64_t bytes = int64_t{map.shape.box_rows} * kSwizzleRowBytes;
    memset(to, 0xff, static_cast<size_t>(bytes));
    block_.defer([=] {
      for (int i = 0; i < map.shape.box_rows; ++i) {
        for (int j = 0; j < map.shape.box_cols; ++j) {
          const unsigned char* from = element(map, row + int64_t{i}, column + int64_t{j});
          unsigned char* place = to + swizzle_128(i * kSwizzleRowBytes + j * 2);
          from == nullptr ? memset(place, 0, 2) : memcpy(place, from, 2);
        }
      }
      bytes_came(barrier, bytes);
    });
  }

  void store(const TensorMap& map, int column, int row, SharedAddress source) {
    FIPS_CHECK(source % kSwizzlePatternBytes == 0,
               "emulation: a tensor store from shared memory that is not aligned to 1024 bytes");
    const auto first = unfenced_.lower_bound(source);
    FIPS_CHECK(first == unfenced_.end() ||
                   first->first >= source + int64_t{map.shape.box_rows} * kSwizzleRowBytes,
               "emulation: a tensor store of shared memory written without fence.proxy.async");
    thread().open_stores.push_back(
        {map, column, row, reinterpret_cast<const unsigned char*>(source)});
  }

  void commit_stores() {
    thread().store_groups.push_back(std::move(thread().open_stores));
    thread().open_stores.clear();
  }

  void wait_stores(size_t pending) {
    auto& groups = thread().store_groups;
    for (; groups.size() > pending; groups.pop_front()) {
      for (const PendingStore& store : groups.front()) {
        perform(store);
      }
    }
  }

  void wrote_shared(SharedAddress chunk) { unfenced_[chunk] = block_.thread; }

  void fence_writes() {
    for (auto it = unfenced_.begin(); it != unfenced_.end();) {
      it = it->second == block_.thread ? unfenced_.erase(it) : std::next(it);
    }
  }

  // ---- wgmma

  void issue(const PendingMma& mma) {
    Sm90Thread& mine = thread();
    FIPS_CHECK(mine.mma_fenced, "emulation: wgmma without a wgmma.fence since the last commit");
    agree({mma.a, mma.b, mma.registers_count, mma.accumulate});
    AccumulatorInFlight& flight = mine.in_flight[mma.registers];
    if (flight.products++ == 0) {
      flight.sums.assign(mma.registers, mma.registers + mma.registers_count);
      std::fill_n(mma.registers, mma.registers_count, std::numeric_limits<float>::quiet_NaN());
    }
    mine.open_mma.push_back(mma);
  }

  void fence_mma() { thread().mma_fenced = true; }

  void commit_mma() {
    Sm90Thread& mine = thread();
    mine.mma_groups.push_back(std::move(mine.open_mma));
    mine.open_mma.clear();
    mine.mma_fenced = false;
  }

  void wait_mma(size_t pending) {
    auto& groups = thread().mma_groups;
    for (; groups.size() > pending; groups.pop_front()) {
      for (const PendingMma& mma : groups.front()) {
        perform(mma);
      }
    }
  }

  // The shared window starts with a kilobyte of the system's own, as on the device.
  uint32_t window_address(SharedAddress address) const {
    return static_cast<uint32_t>(address - reinterpret_cast<SharedAddress>(block_.shared())) +
           kSystemBytes;
  }

 private:
  static constexpr uint64_t kBarrierMark = 0x7261627265666c6dull;
  static constexpr uint32_t kSystemBytes = 1024;

  static void complete_if_done(Mbarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
      barrier.pending = barrier.arrivals;
      ++barrier.phases;
    }
  }

  // Null: outside the tensor.
  static unsigned char* element(const TensorMap& map, int64_t row, int64_t column) {
    const bool inside = row >= 0 && row < map.shape.rows && column >= 0 && column < map.shape.cols;
    return inside ? map.base + (row * map.shape.stride + column) * 2 : nullptr;
  }

  static void perform(const PendingStore& store) {
    for (int i = 0; i < store.map.shape.box_rows; ++i) {
      for (int j = 0; j < store.map.shape.box_cols; ++j) {
        unsigned char* to = element(store.map, store.row + int64_t{i}, store.column + int64_t{j});
        if (to != nullptr) {
          memcpy(to, store.source + swizzle_128(i * kSwizzleRowBytes + j * 2), 2);
        }
      }
    }
  }

  // All threads of a warpgroup issue the same products.
  void agree(const MmaSignature& mine) {
    auto& issued = issued_[block_.thread / kWarpgroupSize];
    const size_t index = thread().mma_issued++;
    if (index == issued.size()) {
      issued.push_back(mine);
    }
    const MmaSignature& first = issued[index];
    FIPS_CHECK(first.a == mine.a && first.b == mine.b && first.n == mine.n &&
                   first.accumulate == mine.accumulate,
               "emulation: the threads of a warpgroup issue different wgmma");
  }

  struct Operand {
    uint32_t start, leading, stride;
    MmaMajor major;
  };

  static Operand decode(uint64_t descriptor, MmaMajor major) {
    const auto field = [&](int bit) {
      return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
    };
    FIPS_CHECK(descriptor >> 62 == kDescriptorSwizzle128,
               "emulation: a wgmma descriptor without 128-byte swizzle");
    FIPS_CHECK((descriptor >> 49 & 7) == 0,
               "emulation: a wgmma descriptor with a base offset; align the tile to 1024 bytes");
    return {field(0), field(16), field(32), major};
  }

  float read(const Operand& operand, int mn, int k, float (*decode_element)(uint16_t)) const {
    const uint32_t address =
        operand.start + mma_operand_offset(operand.major, mn, k, operand.leading, operand.stride);
    uint16_t bits;
    memcpy(&bits, block_.shared() + (swizzle_128(address) - kSystemBytes), sizeof bits);
    return decode_element(bits);
  }

  void perform(const PendingMma& mma) {
    AccumulatorInFlight& flight = thread().in_flight[mma.registers];
    const Operand a = decode(mma.a, mma.major_a), b = decode(mma.b, mma.major_b);
    const int lane = block_.thread % kWarpgroupSize;
    float rows[2][kMmaReduce], column[kMmaReduce];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < kMmaReduce; ++k) {
        rows[half][k] = read(a, mma_accumulator(lane, 2 * half).row, k, mma.decode);
      }
    }
    for (int i = 0; i < mma.registers_count; i += i % 2 == 0 ? 1 : 3) {
      for (int k = 0; k < kMmaReduce; ++k) {
        column[k] = read(b, mma_accumulator(lane, i).col, k, mma.decode);
      }
      for (int half = 0; half < 2; ++half) {
        float& sum = flight.sums[i + 2 * half];
        sum = mma.accumulate ? sum : 0.0f;
        for (int k = 0; k < kMmaReduce; ++k) {
          sum += rows[half][k] * column[k];
        }
      }
    }
    if (--flight.products == 0) {
      std::copy(flight.sums.begin(), flight.sums.end(), mma.registers);
      thread().in_flight.erase(mma.registers);
    }
  }

  Block& block_;
  std::vector<Sm90Thread> threads_;
  std::map<SharedAddress, Mbarrier> barriers_;
  std::map<SharedAddress, int> unfenced_;  // 16-byte chunks and the thread that wrote them
  Meeting named_[16];
  std::vector<std::vector<MmaSignature>> issued_;
  int free_registers_ = 0;
};

template <class T>
float decode_element(uint16_t bits) {
  return to_accumulator(T{bits});
}

}  // namespace emulation

FIPS_DEVICE unsigned char* dynamic_tile_memory() { return dynamic_shared_memory(); }

// ---- threads
// -------------------------------------------------------------------------------------

// Which lane it is, is not to be relied on.
FIPS_DEVICE bool elect_one() {
  const auto* block = emulation::Block::current();
  return block->thread % emulation::kLanes == (block->reverse() ? emulation::kLanes - 1 : 0);
}
FIPS_DEVICE void named_barrier(int id, int threads) {
  emulation::Sm90Block::current().named_barrier(id, threads);
}
template <int kRegisters>
FIPS_DEVICE void give_registers() {
  emulation::Sm90Block::current().set_registers(kRegisters, false);
}
template <int kRegisters>
FIPS_DEVICE void take_registers() {
  emulation::Sm90Block::current().set_registers(kRegisters, true);
}

// ---- mbarriers
// -------------------------------------------------------------------------------------

FIPS_DEVICE void mbarrier_init(SharedAddress barrier, int arrivals) {
  emulation::Sm90Block::current().init(barrier, arrivals);
}
FIPS_DEVICE void mbarrier_init_fence() { emulation::Sm90Block::current().fence_inits(); }
FIPS_DEVICE void mbarrier_arrive(SharedAddress barrier) {
  emulation::Sm90Block::current().arrive(barrier, 0);
}
FIPS_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, int bytes) {
  emulation::Sm90Block::current().arrive(barrier, bytes);
}
FIPS_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity) {
  emulation::Sm90Block::current().wait(barrier, parity);
}

// ---- bulk tensor copies
// ----------------------------------------------------------------------------

FIPS_DEVICE void prefetch_tensor_map(const TensorMap&) {}
FIPS_DEVICE void tensor_load(SharedAddress target, const TensorMap& map, int column, int row,
                             SharedAddress barrier) {
  emulation::Sm90Block::current().load(target, map, column, row, barrier);
}
FIPS_DEVICE void tensor_store(const TensorMap& map, int column, int row, SharedAddress source) {
  emulation::Sm90Block::current().store(map, column, row, source);
}
FIPS_DEVICE void tensor_store_commit() { emulation::Sm90Block::current().commit_stores(); }
template <int kPending>
FIPS_DEVICE void tensor_store_wait_read() {
  emulation::Sm90Block::current().wait_stores(kPending);
}
FIPS_DEVICE void fence_shared_writes() { emulation::Sm90Block::current().fence_writes(); }

// ---- matrices
// --------------------------------------------------------------------------------------

FIPS_DEVICE void stmatrix_x4_transposed(SharedAddress address, const uint32_t (&r)[4]) {
  FIPS_CHECK(address % 16 == 0, "emulation: stmatrix writes rows of 16 aligned bytes");
  auto* block = emulation::Block::current();
  struct Lane {
    SharedAddress address;
    uint32_t r[4];
  };
  const auto lanes = block->exchange(Lane{address, {r[0], r[1], r[2], r[3]}});
  // This lane writes its own 16 bytes: column `lane % 8` of matrix `lane / 8`.
  const int lane = block->thread % emulation::kLanes, matrix = lane / 8, column = lane % 8;
  for (int row = 0; row < 8; ++row) {
    const uint16_t bits = emulation::half_of(lanes[row * 4 + column / 2].r[matrix], column % 2);
    memcpy(reinterpret_cast<unsigned char*>(address) + 2 * row, &bits, sizeof bits);
  }
  emulation::Sm90Block::current().wrote_shared(address);
}

template <class T>
FIPS_DEVICE uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

FIPS_DEVICE uint32_t shared_window_address(SharedAddress address) {
  return emulation::Sm90Block::current().window_address(address);
}

FIPS_DEVICE void wgmma_fence() { emulation::Sm90Block::current().fence_mma(); }
FIPS_DEVICE void wgmma_commit() { emulation::Sm90Block::current().commit_mma(); }
template <int kPending>
FIPS_DEVICE void wgmma_wait() {
  emulation::Sm90Block::current().wait_mma(kPending);
}
template <int kCount>
FIPS_DEVICE void wgmma_settle(float (&)[kCount]) {}
template <int kCount>
FIPS_DEVICE void wgmma_clear(float (&d)[kCount]) {
  std::fill_n(d, kCount, 0.0f);
}

template <class T, int kN, MmaMajor kMajorA, MmaMajor kMajorB>
FIPS_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  emulation::Sm90Block::current().issue(
      {d, kN / 2, a, b, kMajorA, kMajorB, accumulate != 0, &emulation::decode_element<T>});
}

}  // namespace fips::cuda
