// What stands between the linear layers: RMS normalisation and gated activations. Row by row, in a fixed order of
// additions, so that a row has the same bits in every batch size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "numeric.h"

namespace multibatch {

constexpr int64_t kStretch = 256;  // elements that are converted to floats at a time

// Rounds floats to T and back: what storing an intermediate result does.
template <typename T>
inline void round_to(float* values, int64_t n) {
  if constexpr (!std::is_same_v<T, float>) {
    T narrow[kStretch];
    floats_to(values, narrow, n);
    floats_from(narrow, values, n);
  }
}

struct NormOptions {
  float epsilon;
  float offset;      // added to the weight: 1 where the weight is stored as a difference from 1 (Gemma)
  bool round_first;  // the normalised value is rounded to T before it meets the weight (Llama)
};

// y = x / sqrt(mean(x^2) + epsilon) * (weight + offset), for one row of n elements.
template <typename T>
void rms_norm_row(const T* x, const T* weight, T* y, int64_t n, NormOptions o) {
  alignas(64) float stretch[kStretch], scale[kStretch];
  f32x16 squares{};
  for (int64_t k = 0; k < n; k += kStretch) {
    const int64_t live = std::min(kStretch, n - k);
    std::fill(stretch + live / 16 * 16, stretch + std::min(kStretch, (live + 15) / 16 * 16), 0.0f);
    floats_from(x + k, stretch, live);
    for (int64_t i = 0; i < live; i += 16) {
      f32x16 v = load_vector<f32x16>(stretch + i);
      squares += v * v;
    }
  }
  const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + o.epsilon);
  for (int64_t k = 0; k < n; k += kStretch) {
    const int64_t live = std::min(kStretch, n - k);
    floats_from(x + k, stretch, live);
    floats_from(weight + k, scale, live);
    for (int64_t i = 0; i < live; ++i) stretch[i] *= inverse;
    if (o.round_first) round_to<T>(stretch, live);
    for (int64_t i = 0; i < live; ++i) stretch[i] *= scale[i] + o.offset;
    floats_to(stretch, y + k, live);
  }
}

// Turns the first `dims` of one head's numbers by the angles of its position (Su et al. 2021, in the form of two halves), and
// rounds them to T. dims: even, kStretch at most.
template <typename T>
void rotate(float* x, const T* cosines, const T* sines, int64_t dims) {
  alignas(64) float cos[kStretch], sin[kStretch];
  floats_from(cosines, cos, dims);
  floats_from(sines, sin, dims);
  const int64_t half = dims / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    x[d] = a * cos[d] - b * sin[d];
    x[d + half] = b * cos[d + half] + a * sin[d + half];
  }
  round_to<T>(x, dims);
}

// The largest of n numbers; NaN where there is one among them.
template <typename T>
float maximum(const T* x, int64_t n) {
  alignas(64) float stretch[kStretch];
  f32x16 largest = splat(-std::numeric_limits<float>::infinity());
  bool nan = false;
  for (int64_t k = 0; k < n; k += kStretch) {
    const int64_t live = std::min(kStretch, n - k);
    floats_from(x + k, stretch, live);
    std::fill(stretch + live, stretch + (live + 15) / 16 * 16, stretch[0]);
    i32x16 wrong{};
    for (int64_t i = 0; i < live; i += 16) {
      f32x16 v = load_vector<f32x16>(stretch + i);
      wrong |= v != v;
      largest = v > largest ? v : largest;
    }
    for (int i = 0; i < 16; ++i) nan = nan || wrong[i] != 0;
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : max(largest);
}

// The highest of some numbers and where it lies: the first place of several. Of no numbers: place -1.
struct Highest {
  float value = -std::numeric_limits<float>::infinity();
  int64_t place = -1;
  bool nan = false;
  void add(float x, int64_t at) {
    nan = nan || x != x;
    if (x > value || (x == value && at < place)) value = x, place = at;
  }
};

template <typename T>
Highest highest(const T* x, int64_t n) {
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 value = splat(-std::numeric_limits<float>::infinity());
  i32x16 place = i32x16{} - 1, wrong{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = floats_of(x + i);
    const i32x16 higher = v > value;
    wrong |= v != v;
    value = higher ? v : value;
    place = higher ? lane + static_cast<int32_t>(i) : place;
  }
  Highest result;
  for (int j = 0; j < 16; ++j) {
    result.nan = result.nan || wrong[j] != 0;
    if (place[j] >= 0) result.add(value[j], place[j]);
  }
  for (; i < n; ++i) result.add(to_float(x[i]), i);
  return result;
}

enum class Activation { silu, gelu_tanh };

// x * sigmoid(x), through e^-|x| so that nothing overflows.
inline f32x16 silu(f32x16 x) {
  f32x16 e = exp_nonpositive(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// GELU's tanh form (Hendrycks and Gimpel 2016).
inline f32x16 gelu_tanh(f32x16 x) {
  f32x16 u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  f32x16 e = exp_nonpositive(-2.0f * (u < 0.0f ? -u : u));
  f32x16 t = (1.0f - e) / (1.0f + e);
  return 0.5f * x * (1.0f + (u < 0.0f ? -t : t));
}

// activation(gate) * up, rounded to T between the two.
template <typename T>
inline f32x16 gated_product(f32x16 gate, f32x16 up, Activation activation) {
  return rounded<T>(activation == Activation::silu ? silu(gate) : gelu_tanh(gate)) * up;
}

// The same for rows of n elements, stored as T.
template <typename T>
void gate_row(const T* gate, const T* up, T* out, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_floats(gated_product<T>(floats_of(gate + i), floats_of(up + i), activation), out + i);
  if (i == n) return;
  T last[3][16] = {};
  std::copy(gate + i, gate + n, last[0]);
  std::copy(up + i, up + n, last[1]);
  store_floats(gated_product<T>(floats_of(last[0]), floats_of(last[1]), activation), last[2]);
  std::copy_n(last[2], n - i, out + i);
}

}  // namespace multibatch
