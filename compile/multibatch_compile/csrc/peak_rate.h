// How many products a second the micro-kernel makes when its operands lie in the first cache: the limit of a linear layer
// that has rows enough not to wait for its weights.
#pragma once

#include <atomic>
#include <chrono>

#include "panel_product.h"

namespace multibatch {

// Products that the calling thread makes until `end`.
template <typename W>
int64_t products_until(std::chrono::steady_clock::time_point end) {
  using Lane = typename Format<W>::Lane;
  constexpr int unit = Format<W>::unit, lanes = Format<W>::lanes;
  constexpr int64_t units = kChunk / 4 / lanes;  // weights and x fill half of a cache of 32 KiB
  alignas(64) char w[units * kUnitBytes<W>] = {};
  alignas(64) Lane x[kMaxRows * kChunkStride] = {};
  constexpr int J = kPanelVectors<kMaxRows>;
  typename Format<W>::Acc acc[kMaxRows][J] = {};
  int64_t products = 0;
  do {
    for (int i = 0; i < 64; ++i) {
      Ahead<kReadAgain> ahead{w, w + 64, 0, 0};
      panel_product(reinterpret_cast<const W*>(w), 0, x, units, ahead, acc);
      products += kMaxRows * J * 16 * unit * units;
    }
  } while (std::chrono::steady_clock::now() < end);
  // The sums are zeros; to say so keeps the compiler from leaving them out.
  for (auto& row : acc) products += static_cast<int64_t>(row[0][0] + row[J - 1][0]);
  return products;
}

// Products per second of `num_threads` threads, each a tile of `run` for so many seconds.
template <typename W, typename Run>
double peak_rate_of(int num_threads, double seconds, const Run& run) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int64_t> products{0};
  const auto start = Clock::now();
  const auto end = start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  run(num_threads, [&](int64_t) { products += products_until<W>(end); });
  return static_cast<double>(products) / std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace multibatch
