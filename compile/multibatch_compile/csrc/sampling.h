// Weights of tokens for a draw: whole numbers, so that no order of summation can change a sum.
#pragma once

#include <algorithm>
#include <limits>

#include "numeric.h"

namespace multibatch {

using f32x8 = float __attribute__((vector_size(32)));
using i64x8 = int64_t __attribute__((vector_size(64)));

// exp(x / temperature - peak) * scale, rounded down. No x / temperature is above the peak.
struct WeightOf {
  float temperature, peak, scale;

  // Calls fn(first, weights of 8 neighbours) over n logits; weights behind the last are 0.
  template <typename T, typename F>
  void for_eights(const T* logits, int64_t n, const F& fn) const {
    alignas(64) float last[16];
    for (int64_t i = 0; i < n; i += 16) {
      f32x16 x;
      if (i + 16 <= n) {
        x = floats_of(logits + i);
      } else {
        std::fill(last, last + 16, -std::numeric_limits<float>::infinity());
        floats_from(logits + i, last, n - i);
        x = load_vector<f32x16>(last);
      }
      const f32x16 weights = exp_nonpositive(x / temperature - peak) * scale;
      for (int half = 0; half < 2; ++half) {
        const f32x8 eight = load_vector<f32x8>(reinterpret_cast<const float*>(&weights) + 8 * half);
        fn(i + 8 * half, __builtin_convertvector(eight, i64x8));
      }
    }
  }

  template <typename T>
  int64_t sum(const T* logits, int64_t n) const {
    i64x8 total{};
    for_eights(logits, n, [&](int64_t, i64x8 weights) { total += weights; });
    int64_t all = 0;
    for (int i = 0; i < 8; ++i) all += total[i];
    return all;
  }

  template <typename T>
  void each(const T* logits, int64_t n, int64_t* out) const {
    for_eights(logits, n, [&](int64_t first, i64x8 weights) {
      for (int64_t i = 0; i < std::min<int64_t>(8, n - first); ++i) out[first + i] = weights[i];
    });
  }
};

}  // namespace multibatch
