// Causal attention over a paged KV pool: grouped queries, rows of mixed lengths, decode and chunked prefill in one form.
//
// Pool layout per layer: keys [num_blocks, H_kv, D, block_size], values [num_blocks, H_kv, block_size, D_v]; keys are
// stored with positions innermost so that the scores of 16 positions are one vector. Cost follows each row's own length.
// A query's keys are taken in spans of kSpan positions, each with one softmax over all of its scores, merged in order (as
// flash-decoding does, Dao et al. 2023). Spans do not depend on the batch or the chunk, so neither do the bits of the
// result.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "numeric.h"

namespace multibatch {

constexpr int64_t kSpan = 256;
constexpr int64_t kTileRows = 72;  // (query token, query head) pairs that share one read of a block
constexpr int64_t kFewRows = 8;    // up to so many take blocks as they are; for more a layout as lanes pays

struct AttentionShape {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, max_blocks;
  float scale, softcap;    // softcap 0: none
  int64_t sliding_window;  // 0: none; else a query sees itself and the window - 1 positions before it
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t value_stride() const { return (value_dim + 15) / 16 * 16; }
  int64_t score_stride() const { return (kSpan / block_size + 2) * block_size; }  // positions of all blocks of a span
};

// Softmax state of `rows` queries: running maximum, sum, and weighted values [rows, value_stride].
struct Partial {
  float* max;
  float* sum;
  float* out;
};

// What of a query is multiplied at once, or of the weights of values: a float, or, with the instruction for it, a pair of
// bfloat16. Such a pair takes two lines of keys or values: two dimensions, or two positions. Weights are rounded to bfloat16
// for it, as FlashAttention does (Dao et al. 2022); their sum is not.
template <typename T>
using Lane = std::conditional_t<kDotBf16 && std::is_same_v<T, c10::BFloat16>, uint32_t, float>;

template <typename Lane>
constexpr int64_t kElements = std::is_same_v<Lane, uint32_t> ? 2 : 1;  // in a lane

template <typename Lane>
int64_t lanes_of(int64_t elements) {
  return (elements + kElements<Lane> - 1) / kElements<Lane>;
}

template <typename Lane>
struct Queries {
  const Lane* q;             // [rows, lanes_of(head_dim)]
  const int64_t* positions;  // [rows], ascending
  int64_t rows;
};

// Working memory of one thread, sized once per call.
struct Scratch {
  std::vector<float> keys, values, scores, q, row, state;
  std::vector<int64_t> positions;
  void fit(const AttentionShape& s) {
    keys.resize(s.head_dim * s.block_size);
    values.resize(s.score_stride() * s.value_stride());
    scores.resize(kTileRows * s.score_stride());
    q.resize(kTileRows * s.head_dim);
    row.resize(s.head_dim);
    state.resize(2 * kTileRows * (s.value_stride() + 2));
    positions.resize(kTileRows);
  }
  Partial partial(int which, const AttentionShape& s) {
    float* base = state.data() + which * kTileRows * (s.value_stride() + 2);
    return {base, base + kTileRows, base + 2 * kTileRows};
  }
};

// `count` lines of keys [head_dim, block_size] or values [num_keys, value_stride], `stride` elements apart, as the pool has them or
// as `lanes_from` laid them out; and how many bytes behind them what is read next begins.
template <typename E>
struct Lines {
  const E* data;
  int64_t count, stride, ahead;
};

// The same lines from a later element on.
template <typename E>
Lines<E> from_column(Lines<E> lines, int64_t column) {
  lines.data += column;
  return lines;
}

// Fetches what lies `ahead` bytes behind J vectors that are read now. Blocks lie anywhere in the pool, so the processor does
// not do it by itself; and asked for a whole block at once, it waits for that before it computes. Always inline: see fetch_ends.
template <int J, typename E>
MULTIBATCH_INLINE void fetch_ahead(const E* vectors, int64_t ahead) {
  for (size_t byte = 0; byte < J * 16 * sizeof(E); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(vectors) + ahead + byte);
}

inline f32x16 multiply_add(float a, f32x16 b, f32x16 sum) { return sum + b * a; }

#ifdef __AVX512BF16__
inline f32x16 multiply_add(uint32_t pair, u32x16 pairs, f32x16 sum) {
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)), (__m512bh)pairs);
}
#endif

// Sixteen elements of a line, and for pairs of the next line, or of zeros behind the last.
template <typename Lane, typename E>
inline auto vector_of(const E* line, const E* next) {
  if constexpr (std::is_same_v<Lane, float>) {
    return floats_of(line);
  } else if constexpr (std::is_same_v<E, uint32_t>) {
    return load_vector<u32x16>(line);
  } else {
    return widen(load_vector<u16x16>(line)) | widen(load_vector<u16x16>(next)) << 16;
  }
}

// sums[R, 16 J] += a[R, lines] . b[lines, 16 J]: a vector of b is loaded once for all rows, a lane of a once for all vectors,
// and sums of few rows do not wait for each other. Always inline: a function of its own would keep its caller's sums in memory.
template <int R, int J, typename Lane, typename E>
MULTIBATCH_INLINE void add_products(const Lane* a, int64_t a_stride, Lines<E> b, f32x16 (&sums)[R][J]) {
  constexpr int64_t step = std::is_same_v<E, Lane> ? 1 : kElements<Lane>;  // lines
  static const E zeros[16 * J] = {};
  for (int64_t l = 0; l < b.count; l += step, ++a, b.data += step * b.stride) {
    const E* next = l + 1 < b.count ? b.data + b.stride : zeros;
    // Not what was laid out as pairs: the first cache holds it.
    if constexpr (step == kElements<Lane>) fetch_ahead<J>(b.data, b.ahead);
    if constexpr (step == 2) fetch_ahead<J>(next, b.ahead);
    decltype(vector_of<Lane>(next, next)) v[J];
    for (int j = 0; j < J; ++j) v[j] = vector_of<Lane>(b.data + 16 * j, next + 16 * j);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) sums[r][j] = multiply_add(a[r * a_stride], v[j], sums[r][j]);
  }
}

// Calls fn.template operator()<R>(first row) over all rows, kRowsAtOnce at a time as long as there are so many.
template <int R = kRowsAtOnce, typename F>
inline void for_rows(int64_t rows, const F& fn, int64_t first = 0) {
  if constexpr (R > 0) {
    for (; first + R <= rows; first += R) fn.template operator()<R>(first);
    if (first < rows) for_rows<R - 1>(rows, fn, first);
  }
}

// Calls fn.template operator()<J>(first element) over `width` elements, a multiple of 16, as many as are taken at once.
template <typename F>
inline void for_vectors(int64_t width, const F& fn) {
  constexpr int64_t most = 16 * kVectorsAtOnce;
  int64_t j = 0;
  for (; j + most <= width; j += most) fn.template operator()<kVectorsAtOnce>(j);
  if (j < width) fn.template operator()<1>(j);
}

// Lays lines out as lanes, [lanes_of(count), width], for queries that are many.
template <typename Lane, typename T>
Lines<Lane> lanes_from(const Lines<T>& from, int64_t width, float* memory) {
  Lane* const to = reinterpret_cast<Lane*>(memory);
  static const T zeros[16] = {};
  for (int64_t l = 0; l < lanes_of<Lane>(from.count); ++l) {
    const T* line = from.data + l * kElements<Lane> * from.stride;
    const bool has_next = l * kElements<Lane> + 1 < from.count;
    for (int64_t j = 0; j < width; j += 16)
      store_vector(to + l * width + j, vector_of<Lane>(line + j, has_next ? line + from.stride + j : zeros));
  }
  return {to, lanes_of<Lane>(from.count), width, 0};
}

// `n` floats as lanes.
inline void put_lanes(const float* floats, float* lanes, int64_t n) { std::copy_n(floats, n, lanes); }

inline void put_lanes(const float* floats, uint32_t* lanes, int64_t n) {
  lanes[(n - 1) / 2] = 0;  // behind an odd number
  convert(floats, reinterpret_cast<c10::BFloat16*>(lanes), n);
}

// Sixteen floats as lanes.
inline void put_vector(f32x16 v, float* lanes) { store_vector(lanes, v); }

#ifdef __AVX512BF16__
inline void put_vector(f32x16 v, uint32_t* lanes) { store_vector(lanes, bfloat16_of(v)); }
#endif

inline void apply_softcap(float* scores, int64_t n, float softcap) {
  for (int64_t i = 0; i < n; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
}

// Turns one row's scores of a span, the first of them at position `start`, into weights, in the same memory and as lanes.
// Positions outside [first, last] weigh 0. Where none is seen the state stays as it is.
template <typename T>
inline void softmax_row(float* scores, int64_t n, int64_t start, int64_t first, int64_t last, Partial state, int64_t r) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const i32x16 lane = places<i32x16>();
  f32x16 most = splat(lowest);
  for (int64_t j = 0; j < n; j += 16) {
    f32x16 score = load_vector<f32x16>(scores + j);
    const int64_t position = start + j;
    if (position < first || position + 15 > last) {
      i32x16 hidden = (lane < static_cast<int32_t>(first - position)) | (lane > static_cast<int32_t>(last - position));
      score = select(hidden, splat(lowest), score);
      store_vector(scores + j, score);
    }
    most = select(score > most, score, most);
  }
  const float top = max(most);
  if (top == lowest) {
    std::fill(scores, scores + n, 0.0f);
    return;
  }
  f32x16 total{};
  for (int64_t j = 0; j < n; j += 16) {
    f32x16 p = exp_nonpositive_as<T>(load_vector<f32x16>(scores + j) - top);
    put_vector(p, reinterpret_cast<Lane<T>*>(scores) + lanes_of<Lane<T>>(j));
    total += p;
  }
  state.max[r] = top;
  state.sum[r] = sum(total);
}

// Where the blocks of one row and one KV head lie.
template <typename T>
struct Blocks {
  const T* key_pool;
  const T* value_pool;
  const int32_t* table;
  int64_t kv_head;
  const T* keys(int64_t block, const AttentionShape& s) const {
    return key_pool + (table[block] * s.num_kv_heads + kv_head) * s.head_dim * s.block_size;
  }
  const T* values(int64_t block, const AttentionShape& s) const {
    return value_pool + (table[block] * s.num_kv_heads + kv_head) * s.block_size * s.value_dim;
  }
};

template <typename T>
inline int64_t bytes_between(const T* from, const T* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

// Scores of all queries against the blocks of positions [begin, end). Many queries share one layout of a block as lanes; few
// take it as it is, and fetch meanwhile what is read next: a block of keys, then the first one of values.
template <typename T>
void score_blocks(const Queries<Lane<T>>& queries, const Blocks<T>& blocks, int64_t begin, int64_t end, Scratch& scratch,
                  const AttentionShape& s) {
  const int64_t bs = s.block_size, lanes = lanes_of<Lane<T>>(s.head_dim), stride = s.score_stride();
  for (int64_t start = begin; start < end; start += bs) {
    auto score = [&](const auto& keys) {
      for_rows(queries.rows, [&]<int R>(int64_t r) {
        for_vectors(bs, [&]<int J>(int64_t j) {
          f32x16 sums[R][J] = {};
          add_products(queries.q + r * lanes, lanes, from_column(keys, j), sums);
          float* out = scratch.scores.data() + r * stride + start - begin + j;
          for (int i = 0; i < R; ++i)
            for (int v = 0; v < J; ++v) store_vector(out + i * stride + 16 * v, sums[i][v] * s.scale);
        });
      });
    };
    const T* data = blocks.keys(start / bs, s);
    const T* next = start + bs < end ? blocks.keys(start / bs + 1, s) : blocks.values(begin / bs, s);
    const Lines<T> keys{data, s.head_dim, bs, bytes_between(data, next)};
    if (queries.rows > kFewRows) {
      score(lanes_from<Lane<T>>(keys, bs, scratch.keys.data()));
    } else {
      score(keys);
    }
  }
}

// The values of a block. Where they do not fill vectors, a copy of them that does.
template <typename T>
Lines<T> values_of(const Blocks<T>& blocks, int64_t start, int64_t end, const AttentionShape& s) {
  const int64_t bs = s.block_size, count = std::min(bs, end - start), stride = s.value_stride();
  const T* data = blocks.values(start / bs, s);
  if (stride == s.value_dim)
    return {data, count, stride, start + bs < end ? bytes_between(data, blocks.values(start / bs + 1, s)) : 0};
  static thread_local std::vector<T> copy;
  copy.assign(count * stride, T(0.0f));
  for (int64_t k = 0; k < count; ++k) std::copy_n(data + k * s.value_dim, s.value_dim, copy.data() + k * stride);
  return {copy.data(), count, stride, 0};
}

// Adds the elements [d, d + 16 J) of these values, from the `first`th lane of the weights on, to the state.
template <int J, typename T, typename E>
void add_columns(int64_t rows, const Lines<E>& values, int64_t d, int64_t first, Partial state, const Scratch& scratch,
                 const AttentionShape& s) {
  const int64_t stride = s.value_stride(), distance = s.score_stride();
  const Lane<T>* weights = reinterpret_cast<const Lane<T>*>(scratch.scores.data()) + first;
  for_rows(rows, [&]<int R>(int64_t r) {
    f32x16 sums[R][J];
    float* out = state.out + r * stride + d;
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < J; ++v) sums[i][v] = load_vector<f32x16>(out + i * stride + 16 * v);
    add_products(weights + r * distance, distance, values, sums);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < J; ++v) store_vector(out + i * stride + 16 * v, sums[i][v]);
  });
}

// Adds the values of these blocks, weighted, to the state. Many rows share one layout of all of them, columns that are taken at once
// side by side, so that these stay in the first cache, and sums in registers from the first block to the last.
template <typename T>
void add_values(int64_t rows, const Blocks<T>& blocks, int64_t begin, int64_t end, Partial state, Scratch& scratch,
                const AttentionShape& s) {
  const int64_t width = s.value_stride(), most = lanes_of<Lane<T>>(s.score_stride());
  int64_t lanes = 0;
  for (int64_t start = begin; start < end; start += s.block_size) {
    const Lines<T> values = values_of(blocks, start, end, s);
    for_vectors(width, [&]<int J>(int64_t d) {
      if (rows > kFewRows) {
        lanes_from<Lane<T>>(from_column(values, d), 16 * J, scratch.values.data() + d * most + 16 * J * lanes);
      } else {
        add_columns<J, T>(rows, from_column(values, d), d, lanes, state, scratch, s);
      }
    });
    lanes += lanes_of<Lane<T>>(values.count);
  }
  if (rows > kFewRows) {
    for_vectors(width, [&]<int J>(int64_t d) {
      const auto* column = reinterpret_cast<const Lane<T>*>(scratch.values.data()) + d * most;
      add_columns<J, T>(rows, Lines<Lane<T>>{column, lanes, 16 * J, 0}, d, 0, state, scratch, s);
    });
  }
}

// Attention of `queries` over positions [span_start, span_end) of one row and one KV head, into a fresh `state`.
template <typename T>
void attend_span(const Queries<Lane<T>>& queries, const Blocks<T>& blocks, int64_t span_start, int64_t span_end, Partial state,
                 Scratch& scratch, const AttentionShape& s) {
  const int64_t bs = s.block_size;
  std::fill(state.max, state.max + queries.rows, -std::numeric_limits<float>::infinity());
  std::fill(state.sum, state.sum + queries.rows, 0.0f);
  std::fill(state.out, state.out + queries.rows * s.value_stride(), 0.0f);
  const int64_t end = std::min(span_end, queries.positions[queries.rows - 1] + 1);
  const int64_t first_seen = s.sliding_window ? queries.positions[0] - s.sliding_window + 1 : 0;
  const int64_t begin = std::max(span_start, first_seen) / bs * bs;
  score_blocks(queries, blocks, begin, end, scratch, s);
  const int64_t num_scores = std::max<int64_t>(0, (end - begin + bs - 1) / bs * bs);
  for (int64_t r = 0; r < queries.rows; ++r) {
    float* row = scratch.scores.data() + r * s.score_stride();
    if (s.softcap != 0.0f) apply_softcap(row, num_scores, s.softcap);
    const int64_t position = queries.positions[r];
    const int64_t first = std::max(span_start, s.sliding_window ? position - s.sliding_window + 1 : 0);
    softmax_row<T>(row, num_scores, begin, first, std::min(position, span_end - 1), state, r);
  }
  add_values(queries.rows, blocks, begin, end, state, scratch, s);
}

// Adds the state of the next span to `total`, row by row. A span that saw nothing changes no bit.
inline void merge(Partial total, Partial next, int64_t rows, int64_t stride) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    if (next.max[r] == lowest) continue;
    const float top = std::max(total.max[r], next.max[r]);
    const float a = total.max[r] == lowest ? 0.0f : std::exp(total.max[r] - top);
    const float b = std::exp(next.max[r] - top);
    total.sum[r] = total.sum[r] * a + next.sum[r] * b;
    total.max[r] = top;
    float* to = total.out + r * stride;
    const float* from = next.out + r * stride;
    for (int64_t d = 0; d < stride; ++d) to[d] = to[d] * a + from[d] * b;
  }
}

}  // namespace multibatch
