// Sixteen floats at a time: conversions to and from the stored types, and exp. Only what compilers make badly, and the dot
// products of panel_product.h, are asked for by name.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace multibatch {

using f32x16 = Vector<float, 16>;
using i32x16 = Vector<int32_t, 16>;
using u32x16 = Vector<uint32_t, 16>;
using u16x16 = Vector<uint16_t, 16>;

// Sums of products that are made at once: so many vectors for each of so many rows. With AVX-512 they fill 24 of 32 registers; with
// AVX2 8 of 16, as with 10 and more GCC 12 keeps some of them in memory.
constexpr int kVectorsAtOnce = kIsPair<f32x16> ? 1 : 2;
constexpr int kRowsAtOnce = kIsPair<f32x16> ? 4 : 12;

// x - 0 and not 0 + x, which would be an addition: it turns -0 into 0.
MULTIBATCH_INLINE f32x16 splat(float x) { return x - f32x16{}; }

// Whether pairs of bfloat16 are multiplied, and added to a float, by one instruction.
#ifdef __AVX512BF16__
constexpr bool kDotBf16 = true;
#else
constexpr bool kDotBf16 = false;
#endif

inline float to_float(float x) { return x; }
inline float to_float(c10::BFloat16 x) { return static_cast<float>(x); }
inline float to_float(c10::Half x) { return static_cast<float>(x); }

// Sixteen elements as floats.
inline f32x16 floats_of(const float* from) { return load_vector<f32x16>(from); }

// One instruction each with AVX-512; GCC 12 makes five of __builtin_convertvector.
inline u32x16 widen(u16x16 v) {
#ifdef __AVX512F__
  return (u32x16)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return numbers_as<u32x16>(v);
#endif
}

inline u16x16 narrow(u32x16 v) {
#ifdef __AVX512F__
  return (u16x16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return numbers_as<u16x16>(v);
#endif
}

// bfloat16 is the upper half of a float. Spelled out, since compilers make half vectors of the plain loop, and c10's own
// conversions go through a branch.
inline f32x16 floats_of(const c10::BFloat16* from) {
  return bits_as<f32x16>(widen(load_vector<u16x16>(from)) << 16);
}

// 16 halves as floats and back (to nearest, ties to even). By name: GCC converts plain loops one at a time, through memory.
inline f32x16 floats_of(const c10::Half* from) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(load_vector<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  using f32x8 = Vector<float, 8>;
  return {(f32x8)_mm256_cvtph_ps(load_vector<__m128i>(from)), (f32x8)_mm256_cvtph_ps(load_vector<__m128i>(from + 8))};
#else
  float floats[16];
  for (int i = 0; i < 16; ++i) floats[i] = to_float(from[i]);
  return load_vector<f32x16>(floats);
#endif
}

inline void store_halves(f32x16 value, c10::Half* to) {
#if defined(__AVX512F__)
  store_vector(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  store_vector(to, _mm256_cvtps_ph((__m256)value.low, _MM_FROUND_TO_NEAREST_INT));
  store_vector(to + 8, _mm256_cvtps_ph((__m256)value.high, _MM_FROUND_TO_NEAREST_INT));
#else
  float floats[16];
  store_vector(floats, value);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<c10::Half>(floats[i]);
#endif
}

// Sixteen floats as bfloat16, to nearest, ties to even; a NaN stays one. The instruction takes what is below the smallest normal
// number for zero, as that for products does.
inline u16x16 bfloat16_of(f32x16 value) {
#ifdef __AVX512BF16__
  return (u16x16)_mm512_cvtneps_pbh((__m512)value);
#else
  const u32x16 bits = bits_as<u32x16>(value);
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(select(value == value, rounded, u32x16{} + 0x7fc0u));
#endif
}

// Sixteen floats, each the nearest that T can hold.
template <typename T>
inline f32x16 rounded(f32x16 value) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return bits_as<f32x16>(widen(bfloat16_of(value)) << 16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    c10::Half halves[16];
    store_halves(value, halves);
    return floats_of(halves);
  } else {
    return value;
  }
}

// Sixteen floats, stored as another type.
inline void store_floats(f32x16 value, float* to) { store_vector(to, value); }
inline void store_floats(f32x16 value, c10::BFloat16* to) { store_vector(to, bfloat16_of(value)); }
inline void store_floats(f32x16 value, c10::Half* to) { store_halves(value, to); }

// The first `live` of sixteen elements as floats, with zeros behind them; and back. 16 and more: all.
template <typename T>
inline f32x16 floats_of(const T* from, int64_t live) {
  if (live >= 16) return floats_of(from);
  T copy[16] = {};
  std::copy_n(from, live, copy);
  return floats_of(copy);
}

template <typename T>
inline void store_floats(f32x16 value, T* to, int64_t live) {
  if (live >= 16) return store_floats(value, to);
  T copy[16];
  store_floats(value, copy);
  std::copy_n(copy, live, to);
}

// Calls fn(first, live) for each sixteen of n elements, of which the last may have fewer that live.
template <typename F>
inline void for_sixteens(int64_t n, const F& fn) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) fn(i, int64_t{16});
  if (i < n) fn(i, n - i);
}

// n elements of one type as another, by way of floats.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t n) {
  for_sixteens(n, [=](int64_t i, int64_t live) { store_floats(floats_of(from + i, live), to + i, live); });
}

// 2^n p, for whole numbers n from -173 to 0 and p from 0.7 to 1.5. Below what a float can hold: 0, or the nearest with AVX-512.
inline f32x16 scale_by_power(f32x16 p, f32x16 n) {
#ifdef __AVX512F__
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const f32x16 power = bits_as<f32x16>((numbers_as<i32x16>(n) + 127) << 23);
  return select(n < -126.0f, f32x16{}, p * power);
#endif
}

// To nearest, for x <= 0.
inline f32x16 round_nonpositive(f32x16 x) {
#ifdef __AVX512F__
  return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  return numbers_as<f32x16>(numbers_as<i32x16>(x - 0.5f));  // the inner one truncates
#endif
}

// e^x for x <= 0, within 2 ulp: Cephes' polynomial (Moshier, expf), as most vector libraries have it. 0 from -120 on.
inline f32x16 exp_nonpositive(f32x16 x) {
  x = select(x < -120.0f, splat(-120.0f), x);  // a NaN stays one
  f32x16 n = round_nonpositive(x * 1.44269504088896341f);
  f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return scale_by_power(p, n);
}

// The larger of x and `least`; a NaN stays one.
inline f32x16 at_least(float least, f32x16 x) {
#ifdef __AVX512F__
  return (f32x16)_mm512_max_ps((__m512)splat(least), (__m512)x);
#else
  return select(x < least, splat(least), x);
#endif
}

// 2^x for x <= 0, within 3e-6 of itself: a minimax polynomial over [-1/2, 1/2] that is 1 at 0. 0 from -173 on.
inline f32x16 exp2_nonpositive(f32x16 x) {
  x = at_least(-173.0f, x);
  const f32x16 n = round_nonpositive(x), r = x - n;
  f32x16 p = splat(9.582852944731712e-3f);
  p = p * r + 5.5906426161527634e-2f;
  p = p * r + 2.4024099111557007e-1f;
  p = p * r + 6.931241750717163e-1f;
  return scale_by_power(p * r + 1.0f, n);
}

// e^x for x <= 0, near enough for what is rounded to T then: within 2 ulp, or 1e-5 of itself where T has sixteen bits.
template <typename T>
inline f32x16 exp_nonpositive_as(f32x16 x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return exp_nonpositive(x);
  } else {
    return exp2_nonpositive(x * 1.44269504088896341f);
  }
}

inline f32x16 negative_magnitude(f32x16 x) { return bits_as<f32x16>(bits_as<u32x16>(x) | 0x80000000u); }

// Of all elements; without AVX-512 halves first, then one after the other.
template <typename V>
inline float sum(V v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  if constexpr (kIsPair<V>) {
    return sum(v.low + v.high);
  } else {
    float s = v[0];
    for (int i = 1; i < kElementsOf<V>; ++i) s += v[i];
    return s;
  }
#endif
}

template <typename V>
inline float max(V v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  if constexpr (kIsPair<V>) {
    return max(select(v.high > v.low, v.high, v.low));
  } else {
    float m = v[0];
    for (int i = 1; i < kElementsOf<V>; ++i) m = v[i] > m ? v[i] : m;
    return m;
  }
#endif
}

}  // namespace multibatch
