// How weights of each type lie in memory, and the products of a panel of them: the micro-kernel. packed_linear.h has what is
// around it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numeric.h"
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace multibatch {

constexpr int kPanel = 32;
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers
constexpr int kPrefetchBytes = 6144;
#else
constexpr int kMaxRows = 4;
constexpr int kPrefetchBytes = 1024;
#endif

// Weights of four bits, two's complement, in groups of 32 inputs that have one scale for each output, as GGML's Q4_0 has them. A
// group of a panel: [4, 32, 4] bytes, of which byte j of [p, output] holds input 8 p + j in its low half and 8 p + 4 + j in its
// high half, and then 32 scales in bfloat16.
struct Nibbles {
  static constexpr int64_t group = 32, group_bytes = (group / 2 + sizeof(c10::BFloat16)) * kPanel;
  uint8_t both;
};

// Quantised weights meet rows of signed bytes, each with its own scale.
template <typename W>
constexpr bool kQuantized = std::is_same_v<W, int8_t> || std::is_same_v<W, Nibbles>;

// How a weight type is multiplied. A unit is the inputs that lie side by side in the packed weight; a lane is four
// bytes of one row of x: a float, or as many inputs as one dot-product instruction takes.
template <typename W>
struct Format {
  using Lane = float;
  using Acc = f32x16;
  static constexpr int unit = 1;
  static constexpr int lanes = 1;  // per unit
  static constexpr int range = 64;  // units of a panel that two groups of rows take in turn; by measurement
};
template <>
struct Format<c10::BFloat16> {
  using Lane = std::conditional_t<kDotBf16, uint32_t, float>;
  using Acc = f32x16;
  static constexpr int unit = 2;
  static constexpr int lanes = kDotBf16 ? 1 : 2;
  static constexpr int range = 64;
};
template <>
struct Format<int8_t> {
  using Lane = uint32_t;  // four inputs, each 128 + a signed byte
  using Acc = i32x16;
  static constexpr int unit = 4;
  static constexpr int lanes = 1;
  static constexpr int range = 32;
};
template <>
struct Format<Nibbles> {
  using Lane = uint32_t;  // as for int8
  using Acc = f32x16;
  static constexpr int unit = 2 * Nibbles::group;  // whole pairs of cache lines
  static constexpr int lanes = unit / 4;
  static constexpr int range = 4;
};

template <typename W>
int64_t units_of(int64_t k) {
  return (k + Format<W>::unit - 1) / Format<W>::unit;
}

// Bytes of a unit of all outputs of a panel.
template <typename W>
constexpr int64_t kUnitBytes = Format<W>::unit * kPanel * sizeof(W);
template <>
constexpr int64_t kUnitBytes<Nibbles> = 2 * Nibbles::group_bytes;

// How often a unit fetches ahead: once for two cache lines.
template <typename W>
constexpr int64_t kFetches = std::max<int64_t>(1, kUnitBytes<W> / 128);

// Whether weights are read once, so that they need not drive what a step reads again out of the second cache, or by several groups
// of rows in turn. As the hint of __builtin_prefetch.
constexpr int kReadOnce = 0, kReadAgain = 3;

// What a pass over a range of weights fetches ahead, kFetches times with each unit: a line of each of two streams.
template <int Reads>
struct Ahead {
  const char *first, *second;
  int64_t first_step, second_step;  // bytes
  void fetch() {
    __builtin_prefetch(first, 0, Reads);
    __builtin_prefetch(second, 0, Reads);
    first += first_step;
    second += second_step;
  }
};

constexpr int64_t kChunk = 256;
constexpr int64_t kChunkStride = kChunk + 16;  // rows do not fall on the same cache sets

template <int R>
inline void fma_rows(f32x16 (&acc)[R][2], const float* x, f32x16 w0, f32x16 w1) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    f32x16 s = splat(x[r * kChunkStride]);
    acc[r][0] += s * w0;
    acc[r][1] += s * w1;
  }
}

// panel_product: acc[R][32] += x[R, units] . w[units, 32], within one chunk.

template <int R, int Reads>
inline void panel_product(const float* w, const float* x, int64_t units, Ahead<Reads>& ahead, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < units; ++i, w += kPanel, ++x) {
    ahead.fetch();
    fma_rows<R>(acc, x, load_vector<f32x16>(w), load_vector<f32x16>(w + 16));
  }
}

template <int R, int Reads>
inline void panel_product(const c10::Half* w, const float* x, int64_t units, Ahead<Reads>& ahead, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < units; ++i, w += kPanel, ++x) {
    ahead.fetch();
    fma_rows<R>(acc, x, floats_of(w), floats_of(w + 16));
  }
}

template <int R, int Reads>
inline void panel_product(const c10::BFloat16* w, const float* x, int64_t units, Ahead<Reads>& ahead, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < units; ++i, w += 2 * kPanel, x += 2) {
    ahead.fetch();
    u32x16 p0 = load_vector<u32x16>(w), p1 = load_vector<u32x16>(w + kPanel);
    u32x16 even0 = p0 << 16, even1 = p1 << 16, odd0 = p0 & 0xffff0000u, odd1 = p1 & 0xffff0000u;
    fma_rows<R>(acc, x, load_vector<f32x16>(&even0), load_vector<f32x16>(&even1));
    fma_rows<R>(acc, x + 1, load_vector<f32x16>(&odd0), load_vector<f32x16>(&odd1));
  }
}

#ifdef __AVX512BF16__
template <int R, int Reads>
inline void panel_product(const c10::BFloat16* w, const uint32_t* x, int64_t units, Ahead<Reads>& ahead, f32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < units; ++i, w += 2 * kPanel, ++x) {
    ahead.fetch();
    __m512bh w0 = load_vector<__m512bh>(w), w1 = load_vector<__m512bh>(w + kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512bh s = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * kChunkStride]));
      acc[r][0] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][0], s, w0);
      acc[r][1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][1], s, w1);
    }
  }
}
#endif

// Sum over the four bytes of each lane: unsigned x times signed w, without saturation.
inline i32x16 dot_bytes(i32x16 acc, uint32_t x, i32x16 w) {
#ifdef __AVX512VNNI__
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(static_cast<int>(x)), (__m512i)w);
#else
  for (int q = 0; q < 4; ++q) acc += ((w << (24 - 8 * q)) >> 24) * static_cast<int32_t>((x >> (8 * q)) & 0xffu);
  return acc;
#endif
}

template <int R, int Reads>
inline void panel_product(const int8_t* w, const uint32_t* x, int64_t units, Ahead<Reads>& ahead, i32x16 (&acc)[R][2]) {
  for (int64_t i = 0; i < units; ++i, w += 4 * kPanel, ++x) {
    ahead.fetch();
    i32x16 w0 = load_vector<i32x16>(w), w1 = load_vector<i32x16>(w + 2 * kPanel);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r][0] = dot_bytes(acc[r][0], x[r * kChunkStride], w0);
      acc[r][1] = dot_bytes(acc[r][1], x[r * kChunkStride], w1);
    }
  }
}

template <int R, int Reads>
inline void panel_product(const Nibbles* w, const uint32_t* x, int64_t units, Ahead<Reads>& ahead, f32x16 (&acc)[R][2]) {
  // Each half of a byte is taken as the byte of 16 times its value.
  const i32x16 high = (i32x16)(u32x16{} + 0xf0f0f0f0u);
  for (int64_t u = 0; u < units; ++u) {
    ahead.fetch();
    for (int group = 0; group < 2; ++group, w += Nibbles::group_bytes, x += Nibbles::group / 4) {
      i32x16 sums[R][2] = {};
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        ahead.fetch();
        const i32x16 w0 = load_vector<i32x16>(w + 4 * kPanel * p), w1 = load_vector<i32x16>(w + 4 * kPanel * p + 64);
        const i32x16 low0 = (w0 << 4) & high, low1 = (w1 << 4) & high, high0 = w0 & high, high1 = w1 & high;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const uint32_t first = x[r * kChunkStride + 2 * p], second = x[r * kChunkStride + 2 * p + 1];
          sums[r][0] = dot_bytes(dot_bytes(sums[r][0], first, low0), second, high0);
          sums[r][1] = dot_bytes(dot_bytes(sums[r][1], first, low1), second, high1);
        }
      }
      const auto* scales = reinterpret_cast<const c10::BFloat16*>(w + 4 * kPanel * 4);
      const f32x16 s0 = floats_of(scales), s1 = floats_of(scales + 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[r][0] += __builtin_convertvector(sums[r][0], f32x16) * s0;
        acc[r][1] += __builtin_convertvector(sums[r][1], f32x16) * s1;
      }
    }
  }
}

}  // namespace multibatch
