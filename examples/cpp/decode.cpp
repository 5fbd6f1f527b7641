// One token through a gated MLP on shared factors, without torch: pack two sparse factors, run the
// decoding kernel on the threads of this program, and compare with plain loops.
#include <fips/core/pack.h>
#include <fips/kernels/cpu/dispatch.h>
#include <fips/kernels/shared_mlp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kWidth = 512, kRank = 384, kHidden = 1536;
constexpr int32_t kBlock = 32;
constexpr double kDensity = 0.5;  // of the blocks

int64_t thread_count() { return std::max(1u, std::thread::hardware_concurrency()); }

// A real program has a pool of threads; these start and end with each product.
void run_on_threads(int64_t tasks, int64_t grain, fips::Parallel::Body body, void* context) {
  const int64_t wanted = (tasks + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t ranges = std::max<int64_t>(1, std::min(thread_count(), wanted));
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < ranges; ++i) {
    threads.emplace_back(body, context, i * tasks / ranges, (i + 1) * tasks / ranges);
  }
  body(context, 0, tasks / ranges);
  for (std::thread& thread : threads) {
    thread.join();
  }
}

std::vector<float> gaussian(int64_t count, double deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, static_cast<float>(deviation));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = normal(random);
  }
  return values;
}

// V [rank, hidden], zero outside the blocks it keeps, dense and packed.
struct Factor {
  explicit Factor(std::mt19937& random)
      : dense(gaussian(kRank * kHidden, 1 / std::sqrt(kRank * kDensity), random)) {
    std::bernoulli_distribution kept(kDensity);
    std::vector<uint8_t> keep(dense.size());
    for (int64_t row = 0; row < kRank; row += kBlock) {
      for (int64_t col = 0; col < kHidden; col += kBlock) {
        const bool stored = kept(random);
        for (int64_t i = 0; i < kBlock * kBlock; ++i) {
          const int64_t at = (row + i / kBlock) * kHidden + col + i % kBlock;
          keep[static_cast<size_t>(at)] = stored;
          dense[static_cast<size_t>(at)] *= stored;
        }
      }
    }
    packed = fips::pack(dense.data(), keep.data(), kRank, kHidden, kBlock, kBlock, sizeof(float),
                        /*bitmap=*/false);
  }

  std::vector<float> dense;
  fips::PackedSlice packed;
};

// y [cols] = x [rows] M, or with `transpose` M x.
std::vector<double> product(const std::vector<double>& x, const std::vector<float>& m, int64_t cols,
                            bool transpose) {
  const int64_t rows = static_cast<int64_t>(m.size()) / cols;
  std::vector<double> y(static_cast<size_t>(transpose ? rows : cols));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double weight = m[static_cast<size_t>(i * cols + j)];
      y[static_cast<size_t>(transpose ? i : j)] +=
          x[static_cast<size_t>(transpose ? j : i)] * weight;
    }
  }
  return y;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const std::vector<float> x = gaussian(kWidth, 1, random);
  const std::vector<float> base = gaussian(kWidth * kRank, 1 / std::sqrt(double{kWidth}), random);
  const Factor up(random), gate(random), down(random);
  std::vector<float> y(kWidth);

  fips::SharedMlpParams mlp;
  mlp.dtype = fips::DType::kFloat32;
  mlp.width = kWidth;
  mlp.x = x.data();
  mlp.tokens = 1;
  mlp.x_stride = kWidth;
  mlp.base = mlp.base_out = base.data();  // y = h V_down^T U^T: one base reads and writes
  mlp.rank = mlp.rank_out = kRank;
  mlp.up = up.packed.view(mlp.dtype);
  const fips::BlockSparseView gate_view = gate.packed.view(mlp.dtype);
  mlp.gate = &gate_view;
  mlp.down = down.packed.view(mlp.dtype);
  mlp.activation = fips::Activation::kSilu;
  mlp.y = y.data();
  mlp.y_stride = kWidth;

  const fips::Parallel parallel{run_on_threads, thread_count};
  std::vector<char> workspace(
      static_cast<size_t>(fips::cpu::shared_mlp_decode_workspace(mlp, parallel)));
  const auto start = std::chrono::steady_clock::now();
  if (!fips::cpu::decodes_shared_mlp(mlp) ||
      !fips::cpu::shared_mlp_decode(mlp, workspace.data(), parallel)) {
    std::printf("not a call for the decoding kernel, or a damaged index\n");
    return EXIT_FAILURE;
  }
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;

  const std::vector<double> z = product({x.begin(), x.end()}, base, kRank, false);
  std::vector<double> h = product(z, up.dense, kHidden, false);
  const std::vector<double> g = product(z, gate.dense, kHidden, false);
  for (size_t i = 0; i < h.size(); ++i) {
    h[i] *= g[i] / (1 + std::exp(-g[i]));
  }
  const std::vector<double> expected =
      product(product(h, down.dense, kHidden, true), base, kRank, true);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (y[i] - expected[i]) * (y[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double error = std::sqrt(difference / norm);
  const double stored = static_cast<double>(base.size() * sizeof(float)) +
                        static_cast<double>(up.packed.stored_bytes() + gate.packed.stored_bytes() +
                                            down.packed.stored_bytes());
  std::printf("%s, %lld threads: one token in %.0f us, %.2f of the dense bytes\n",
              fips::cpu::isa_name(fips::cpu::active_isa()), static_cast<long long>(thread_count()),
              taken.count(), stored / (3.0 * kWidth * kHidden * sizeof(float)));
  std::printf("relative error %.1e: %s\n", error, error < 1e-5 ? "ok" : "wrong");
  return error < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
