// y = x W^T + b with W packed once into panels of 32 outputs, for few rows (decode) and many (prefill).
//
// Layout (multibatch_compile/packing.py writes it): bfloat16 [N/32, K/2, 32, 2], float32 and float16 [N/32, K, 32],
// N and K rounded up with zeros. A panel is one contiguous stream, read once for up to kMaxRows rows of x.
// Each output adds its K products in the same order whatever the number of rows, so a row's result has the same
// bits in every batch size.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numeric.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace multibatch {

constexpr int kPanel = 32;
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers
constexpr int kPrefetchBytes = 3072;
#else
constexpr int kMaxRows = 4;
constexpr int kPrefetchBytes = 1024;
#endif

#ifdef __AVX512BF16__
constexpr bool kDotBf16 = true;
#else
constexpr bool kDotBf16 = false;
#endif

// What the micro-kernel reads x as: bfloat16 pairs where there is a dot product for them, else floats.
template <typename W>
using Operand = std::conditional_t<kDotBf16 && std::is_same_v<W, c10::BFloat16>, c10::BFloat16, float>;

template <typename W>
struct Depth {
  static constexpr int step = std::is_same_v<W, c10::BFloat16> ? 2 : 1;  // inputs that lie side by side
  static int64_t padded(int64_t k) { return (k + step - 1) / step * step; }
};

template <int R>
inline void fma_rows(f32x16 (&acc)[R][2], const float* x, int64_t ldx, f32x16 w0, f32x16 w1) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    f32x16 s = splat(x[r * ldx]);
    acc[r][0] += s * w0;
    acc[r][1] += s * w1;
  }
}

template <int R>
inline void panel_product(const float* w, const float* x, int64_t ldx, int64_t k, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < k; ++i, w += kPanel) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes + 64);
    fma_rows<R>(acc, x + i, ldx, load_vector<f32x16>(w), load_vector<f32x16>(w + 16));
  }
}

template <int R>
inline void panel_product(const c10::Half* w, const float* x, int64_t ldx, int64_t k, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < k; ++i, w += kPanel) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes);
    alignas(64) float wide[kPanel];
    floats_from(w, wide, kPanel);
    fma_rows<R>(acc, x + i, ldx, load_vector<f32x16>(wide), load_vector<f32x16>(wide + 16));
  }
}

template <int R>
inline void panel_product(const c10::BFloat16* w, const float* x, int64_t ldx, int64_t k, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes + 64);
    u32x16 p0 = load_vector<u32x16>(w), p1 = load_vector<u32x16>(w + kPanel);
    u32x16 even0 = p0 << 16, even1 = p1 << 16, odd0 = p0 & 0xffff0000u, odd1 = p1 & 0xffff0000u;
    fma_rows<R>(acc, x + i, ldx, load_vector<f32x16>(&even0), load_vector<f32x16>(&even1));
    fma_rows<R>(acc, x + i + 1, ldx, load_vector<f32x16>(&odd0), load_vector<f32x16>(&odd1));
  }
}

#ifdef __AVX512BF16__
template <int R>
inline void panel_product(const c10::BFloat16* w, const c10::BFloat16* x, int64_t ldx, int64_t k,
                          f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < k; i += 2, w += 2 * kPanel) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes + 64);
    __m512bh w0 = load_vector<__m512bh>(w), w1 = load_vector<__m512bh>(w + kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x + r * ldx + i, 4);
      __m512bh s = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
      acc[r][0] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][0], s, w0);
      acc[r][1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][1], s, w1);
    }
  }
}
#endif

template <typename T, int R>
void panel_rows(const T* panel, const Operand<T>* x, int64_t ldx, int64_t k, const T* bias, T* y, int64_t ldy,
                int64_t num_outputs) {
  f32x16 acc[R][2] = {};
  panel_product<R>(panel, x, ldx, k, acc);
  alignas(64) float bias32[kPanel] = {};
  if (bias) floats_from(bias, bias32, num_outputs);
  for (int r = 0; r < R; ++r) {
    alignas(64) float out[kPanel];
    store_vector(out, acc[r][0] + load_vector<f32x16>(bias32));
    store_vector(out + 16, acc[r][1] + load_vector<f32x16>(bias32 + 16));
    floats_to(out, y + r * ldy, num_outputs);
  }
}

template <typename T, int R = kMaxRows>
void panel_rows_of(int rows, const T* panel, const Operand<T>* x, int64_t ldx, int64_t k, const T* bias, T* y,
                   int64_t ldy, int64_t num_outputs) {
  if constexpr (R > 0) {
    if (rows == R) return panel_rows<T, R>(panel, x, ldx, k, bias, y, ldy, num_outputs);
    panel_rows_of<T, R - 1>(rows, panel, x, ldx, k, bias, y, ldy, num_outputs);
  }
}

// One tile: the 32 outputs of panel `p` for all M rows. x: [M, ldx] operands; y: [M, N].
template <typename T>
void linear_panel(int64_t p, const T* packed, const Operand<T>* x, int64_t ldx, const T* bias, T* y, int64_t M,
                  int64_t N, int64_t K) {
  const int64_t depth = Depth<T>::padded(K);
  const int64_t num_outputs = std::min<int64_t>(kPanel, N - p * kPanel);
  const int64_t groups = (M + kMaxRows - 1) / kMaxRows;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t rows = (M - row + (groups - g) - 1) / (groups - g);  // groups of nearly equal size
    panel_rows_of<T>(static_cast<int>(rows), packed + p * depth * kPanel, x + row * ldx, ldx, depth,
                     bias ? bias + p * kPanel : nullptr, y + row * N + p * kPanel, N, num_outputs);
    row += rows;
  }
}

}  // namespace multibatch
