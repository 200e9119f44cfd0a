// What stands between the linear layers: RMS normalisation and gated activations. Row by row, in a fixed order of
// additions, so that a row has the same bits in every batch size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "numeric.h"

namespace multibatch {

struct NormOptions {
  float epsilon;
  float offset;      // added to the weight: 1 where the weight is stored as a difference from 1 (Gemma)
  bool round_first;  // the normalised value is rounded to T before it meets the weight (Llama)
};

// y = x / sqrt(mean(x^2) + epsilon) * (weight + offset), for one row of n elements.
template <typename T>
void rms_norm_row(const T* x, const T* weight, T* y, int64_t n, NormOptions o) {
  f32x16 squares{};
  for_sixteens(n, [&](int64_t i, int64_t live) {
    const f32x16 v = floats_of(x + i, live);
    squares += v * v;
  });
  const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + o.epsilon);
  for_sixteens(n, [&](int64_t i, int64_t live) {
    const f32x16 v = floats_of(x + i, live) * inverse;
    store_floats((o.round_first ? rounded<T>(v) : v) * (floats_of(weight + i, live) + o.offset), y + i, live);
  });
}

// Turns the first `dims` of one head's numbers by the angles of its position (Su et al. 2021, in the form of two halves), and
// rounds them to T. dims: even.
template <typename T>
void rotate(float* x, const T* cosines, const T* sines, int64_t dims) {
  const int64_t half = dims / 2;
  for_sixteens(half, [&](int64_t d, int64_t live) {
    const f32x16 a = floats_of(x + d, live), b = floats_of(x + half + d, live);
    store_floats(rounded<T>(a * floats_of(cosines + d, live) - b * floats_of(sines + d, live)), x + d, live);
    const f32x16 cos = floats_of(cosines + half + d, live), sin = floats_of(sines + half + d, live);
    store_floats(rounded<T>(b * cos + a * sin), x + half + d, live);
  });
}

// The largest of n numbers; NaN where there is one among them.
template <typename T>
float maximum(const T* x, int64_t n) {
  f32x16 largest = splat(-std::numeric_limits<float>::infinity());
  i32x16 wrong{};
  for_sixteens(n, [&](int64_t i, int64_t live) {
    f32x16 v = floats_of(x + i, live);
    wrong |= v != v;
    if (live < 16) v = select(places<i32x16>() < static_cast<int32_t>(live), v, largest);
    largest = select(v > largest, v, largest);
  });
  return any(wrong) ? std::numeric_limits<float>::quiet_NaN() : max(largest);
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
  const i32x16 lane = places<i32x16>();
  f32x16 value = splat(-std::numeric_limits<float>::infinity());
  i32x16 place = i32x16{} - 1, wrong{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = floats_of(x + i);
    const i32x16 higher = v > value;
    wrong |= v != v;
    value = select(higher, v, value);
    place = select(higher, lane + static_cast<int32_t>(i), place);
  }
  Highest result;
  result.nan = any(wrong);
  for (int j = 0; j < 16; ++j)
    if (place[j] >= 0) result.add(value[j], place[j]);
  for (; i < n; ++i) result.add(to_float(x[i]), i);
  return result;
}

enum class Activation { silu, gelu_tanh };

// x * sigmoid(x), through e^-|x| so that nothing overflows.
template <typename T>
inline f32x16 silu(f32x16 x) {
  const f32x16 e = exp_nonpositive_as<T>(negative_magnitude(x));
  return select(x < 0.0f, x * e, x) / (1.0f + e);
}

// GELU's tanh form (Hendrycks and Gimpel 2016).
template <typename T>
inline f32x16 gelu_tanh(f32x16 x) {
  f32x16 u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  f32x16 e = exp_nonpositive_as<T>(2.0f * negative_magnitude(u));
  f32x16 t = (1.0f - e) / (1.0f + e);
  return 0.5f * x * (1.0f + select(u < 0.0f, -t, t));
}

// activation(gate) * up, rounded to T between the two.
template <typename T>
inline f32x16 gated_product(f32x16 gate, f32x16 up, Activation activation) {
  return rounded<T>(activation == Activation::silu ? silu<T>(gate) : gelu_tanh<T>(gate)) * up;
}

// The same for rows of n elements, stored as T.
template <typename T>
void gate_row(const T* gate, const T* up, T* out, int64_t n, Activation activation) {
  for_sixteens(n, [&](int64_t i, int64_t live) {
    store_floats(gated_product<T>(floats_of(gate + i, live), floats_of(up + i, live), activation), out + i, live);
  });
}

}  // namespace multibatch
