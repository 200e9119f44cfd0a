// How weights of each type lie in memory, and the products of a panel of them: the micro-kernel. packed_linear.h has what is
// around it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "numeric.h"

namespace multibatch {

constexpr int kPanel = 32;
constexpr int kMaxRows = kRowsAtOnce;
// Vectors of a panel whose sums, for so many rows, are made at once: both, or one after the other where registers hold no more.
template <int R>
constexpr int kPanelVectors = R * 2 <= kRowsAtOnce * kVectorsAtOnce ? 2 : 1;
#if defined(__AVX512F__)
constexpr int kPrefetchBytes = 6144;
#else
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

struct NothingAhead {
  void fetch() {}
};

constexpr int64_t kChunk = 256;
constexpr int64_t kChunkStride = kChunk + 16;  // rows do not fall on the same cache sets

template <int R, int J>
MULTIBATCH_INLINE void fma_rows(f32x16 (&acc)[R][J], const float* x, const f32x16 (&w)[J]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    f32x16 s = splat(x[r * kChunkStride]);
    for (int j = 0; j < J; ++j) acc[r][j] += s * w[j];
  }
}

// panel_product: acc[R][16 J] += x[R, units] . w[units, 16 J], within one chunk, of a panel's vectors from `first` on.

template <int R, int J, typename A>
inline void panel_product(const float* w, int first, const float* x, int64_t units, A& ahead, f32x16 (&acc)[R][J]) {
  for (int64_t i = 0; i < units; ++i, w += kPanel, ++x) {
    ahead.fetch();
    f32x16 v[J];
    for (int j = 0; j < J; ++j) v[j] = load_vector<f32x16>(w + 16 * (first + j));
    fma_rows(acc, x, v);
  }
}

template <int R, int J, typename A>
inline void panel_product(const c10::Half* w, int first, const float* x, int64_t units, A& ahead, f32x16 (&acc)[R][J]) {
  for (int64_t i = 0; i < units; ++i, w += kPanel, ++x) {
    ahead.fetch();
    f32x16 v[J];
    for (int j = 0; j < J; ++j) v[j] = floats_of(w + 16 * (first + j));
    fma_rows(acc, x, v);
  }
}

template <int R, int J, typename A>
inline void panel_product(const c10::BFloat16* w, int first, const float* x, int64_t units, A& ahead, f32x16 (&acc)[R][J]) {
  for (int64_t i = 0; i < units; ++i, w += 2 * kPanel, x += 2) {
    ahead.fetch();
    f32x16 even[J], odd[J];
    for (int j = 0; j < J; ++j) {
      const u32x16 pairs = load_vector<u32x16>(w + 32 * (first + j));
      even[j] = bits_as<f32x16>(pairs << 16);
      odd[j] = bits_as<f32x16>(pairs & 0xffff0000u);
    }
    fma_rows(acc, x, even);
    fma_rows(acc, x + 1, odd);
  }
}

#ifdef __AVX512BF16__
template <int R, int J, typename A>
inline void panel_product(const c10::BFloat16* w, int first, const uint32_t* x, int64_t units, A& ahead, f32x16 (&acc)[R][J]) {
  for (int64_t i = 0; i < units; ++i, w += 2 * kPanel, ++x) {
    ahead.fetch();
    __m512bh v[J];
    for (int j = 0; j < J; ++j) v[j] = load_vector<__m512bh>(w + 32 * (first + j));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512bh s = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * kChunkStride]));
      for (int j = 0; j < J; ++j) acc[r][j] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][j], s, v[j]);
    }
  }
}
#endif

// Sum over the four bytes of each lane: unsigned x times signed w, without saturation.
inline i32x16 dot_bytes(i32x16 acc, uint32_t x, i32x16 w) {
#ifdef __AVX512VNNI__
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(static_cast<int>(x)), (__m512i)w);
#elif defined(__AVX512BW__)
  // The low bytes of each sixteen bits, and the high ones: one instruction multiplies pairs of them and adds the two.
  const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8), high = _mm512_srai_epi16((__m512i)w, 8);
  const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
  const __m512i x_low = _mm512_and_si512(all, _mm512_set1_epi32(0x00ff00ff)), x_high = _mm512_srli_epi16(all, 8);
  return acc + (i32x16)_mm512_add_epi32(_mm512_madd_epi16(x_low, low), _mm512_madd_epi16(x_high, high));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  auto add = [x](auto sums, auto w) {  // as above
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8), high = _mm256_srai_epi16((__m256i)w, 8);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    const __m256i x_low = _mm256_and_si256(all, _mm256_set1_epi32(0x00ff00ff)), x_high = _mm256_srli_epi16(all, 8);
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(x_low, low), _mm256_madd_epi16(x_high, high));
    return sums + (decltype(sums))both;
  };
  return {add(acc.low, w.low), add(acc.high, w.high)};
#else
  for (int q = 0; q < 4; ++q) acc += ((w << (24 - 8 * q)) >> 24) * static_cast<int32_t>((x >> (8 * q)) & 0xffu);
  return acc;
#endif
}

template <int R, int J, typename A>
inline void panel_product(const int8_t* w, int first, const uint32_t* x, int64_t units, A& ahead, i32x16 (&acc)[R][J]) {
  for (int64_t i = 0; i < units; ++i, w += 4 * kPanel, ++x) {
    ahead.fetch();
    i32x16 v[J];
    for (int j = 0; j < J; ++j) v[j] = load_vector<i32x16>(w + 64 * (first + j));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) acc[r][j] = dot_bytes(acc[r][j], x[r * kChunkStride], v[j]);
  }
}

// Weights of four bits as bytes, from the low or the high halves; the sum over four of them in each lane, as dot_bytes makes it; and
// 16 times the sum of a group of inputs.
#if (defined(__AVX512BW__) && !defined(__AVX512VNNI__)) || (defined(__AVX2__) && !defined(__AVX512F__))
using u8x64 = Vector<uint8_t, 64>;

inline i32x16 signed_nibbles(u8x64 nibbles) { return bits_as<i32x16>((nibbles ^ 8) - 8); }
inline i32x16 low_nibbles(i32x16 both) { return signed_nibbles(bits_as<u8x64>(both) & 15); }
inline i32x16 high_nibbles(i32x16 both) { return signed_nibbles(bits_as<u8x64>(both) >> 4); }

// Two sums of sixteen bits in each lane: those of a group are 16 products of up to 255 * 8.
inline i32x16 dot_nibbles(i32x16 acc, uint32_t x, i32x16 w) {
#ifdef __AVX512BW__
  return (i32x16)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16(_mm512_set1_epi32(static_cast<int>(x)), (__m512i)w));
#else
  auto add = [x](auto sums, auto w) {
    const __m256i products = _mm256_maddubs_epi16(_mm256_set1_epi32(static_cast<int>(x)), (__m256i)w);
    return (decltype(sums))_mm256_add_epi16((__m256i)sums, products);
  };
  return {add(acc.low, w.low), add(acc.high, w.high)};
#endif
}

inline f32x16 nibble_sums(i32x16 sums) {
  return numbers_as<f32x16>((((sums << 16) >> 16) + (sums >> 16)) << 4);
}
#else
// As bytes 16 times too large, which the halves of bytes already are.
inline i32x16 low_nibbles(i32x16 both) { return (both << 4) & bits_as<i32x16>(u32x16{} + 0xf0f0f0f0u); }
inline i32x16 high_nibbles(i32x16 both) { return both & bits_as<i32x16>(u32x16{} + 0xf0f0f0f0u); }
inline i32x16 dot_nibbles(i32x16 acc, uint32_t x, i32x16 w) { return dot_bytes(acc, x, w); }
inline f32x16 nibble_sums(i32x16 sums) { return numbers_as<f32x16>(sums); }
#endif

// sums[R][16 J] += x[R, 8 inputs] . w[8 inputs, 16 J] of a group of inputs.
template <int R, int J>
MULTIBATCH_INLINE void dot_rows(const uint8_t* w, const uint32_t* x, i32x16 (&sums)[R][J]) {
  i32x16 low[J], high[J];
  for (int j = 0; j < J; ++j) {
    const i32x16 both = load_vector<i32x16>(w + 64 * j);
    low[j] = low_nibbles(both), high[j] = high_nibbles(both);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j)
      sums[r][j] = dot_nibbles(dot_nibbles(sums[r][j], x[r * kChunkStride], low[j]), x[r * kChunkStride + 1], high[j]);
}

template <int R, int J, typename A>
inline void panel_product(const Nibbles* w, int first, const uint32_t* x, int64_t units, A& ahead, f32x16 (&acc)[R][J]) {
  const uint8_t* bytes = &w->both;
  for (int64_t u = 0; u < units; ++u) {
    ahead.fetch();
    for (int group = 0; group < 2; ++group, bytes += Nibbles::group_bytes, x += Nibbles::group / 4) {
      i32x16 sums[R][J] = {};
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        ahead.fetch();
        dot_rows(bytes + 4 * kPanel * p + 64 * first, x + 2 * p, sums);
      }
      const auto* scales = reinterpret_cast<const c10::BFloat16*>(bytes + 4 * kPanel * 4);
      f32x16 s[J];
      for (int j = 0; j < J; ++j) s[j] = floats_of(scales + 16 * (first + j));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < J; ++j) acc[r][j] += nibble_sums(sums[r][j]) * s[j];
    }
  }
}

}  // namespace multibatch
