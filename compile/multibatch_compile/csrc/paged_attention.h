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
#include <vector>

#include "numeric.h"

namespace multibatch {

constexpr int64_t kSpan = 256;
constexpr int64_t kTileRows = 64;  // (query token, query head) pairs that share one read of a block
constexpr int64_t kFewRows = 8;    // up to so many are computed at once, see for_rows

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

struct Queries {
  const float* q;            // [rows, head_dim], already scaled
  const int64_t* positions;  // [rows], ascending
  int64_t rows;
};

// Working memory of one thread, sized once per call.
struct Scratch {
  std::vector<float> keys, values, scores, q, state;
  std::vector<int64_t> positions;
  void fit(const AttentionShape& s) {
    keys.resize(s.head_dim * s.block_size);
    values.resize(s.block_size * s.value_stride());
    scores.resize(kTileRows * s.score_stride());
    q.resize(kTileRows * s.head_dim);
    state.resize(2 * kTileRows * (s.value_stride() + 2));
    positions.resize(kTileRows);
  }
  Partial partial(int which, const AttentionShape& s) {
    float* base = state.data() + which * kTileRows * (s.value_stride() + 2);
    return {base, base + kTileRows, base + 2 * kTileRows};
  }
};

// Fetches what lies `ahead` bytes behind J vectors that are read now. Blocks lie anywhere in the pool, so the processor does
// not do it by itself; and asked for a whole block at once, it waits for that before it computes.
template <int J, typename T>
inline void fetch_ahead(const T* vectors, int64_t ahead) {
  for (size_t byte = 0; byte < J * 16 * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(vectors) + ahead + byte);
}

// scores[R, 16 J] = q . keys for R rows and J vectors of positions at once: a key vector is loaded once for all rows, a
// query's element once for all vectors, and sums of few rows do not wait for each other. K: as the pool stores them, or floats.
template <int R, int J, typename K>
inline void score_vectors(const float* q, const K* keys, int64_t ahead, float* scores, const AttentionShape& s) {
  f32x16 acc[R][J] = {};
  for (int64_t d = 0; d < s.head_dim; ++d) {
    fetch_ahead<J>(keys + d * s.block_size, ahead);
    f32x16 k[J];
    for (int j = 0; j < J; ++j) k[j] = floats_of(keys + d * s.block_size + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) acc[r][j] += k[j] * q[r * s.head_dim + d];
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store_vector(scores + r * s.score_stride() + 16 * j, acc[r][j]);
}

template <int R, typename K>
inline void score_rows(const float* q, const K* keys, int64_t ahead, float* scores, const AttentionShape& s) {
  int64_t j = 0;
  for (; j + 32 <= s.block_size; j += 32) score_vectors<R, 2>(q, keys + j, ahead, scores + j, s);
  if (j < s.block_size) score_vectors<R, 1>(q, keys + j, ahead, scores + j, s);
}

// The values of a block, `stride` elements from one position to the next; and how many bytes behind it the next block lies.
template <typename V>
struct Values {
  const V* data;
  int64_t stride, num_keys, ahead;
};

// out[R, 16 J] += scores . values, in the same way.
template <int R, int J, typename V>
inline void value_vectors(const float* scores, Values<V> values, float* out, const AttentionShape& s) {
  const int64_t stride = s.value_stride(), score_stride = s.score_stride();
  f32x16 acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = load_vector<f32x16>(out + r * stride + 16 * j);
  for (int64_t k = 0; k < values.num_keys; ++k) {
    fetch_ahead<J>(values.data + k * values.stride, values.ahead);
    f32x16 v[J];
    for (int j = 0; j < J; ++j) v[j] = floats_of(values.data + k * values.stride + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) acc[r][j] += v[j] * scores[r * score_stride + k];
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store_vector(out + r * stride + 16 * j, acc[r][j]);
}

template <int R, typename V>
inline void value_rows(const float* scores, Values<V> values, float* out, const AttentionShape& s) {
  int64_t d = 0;
  for (; d + 32 <= s.value_stride(); d += 32, values.data += 32) value_vectors<R, 2>(scores, values, out + d, s);
  if (d < s.value_stride()) value_vectors<R, 1>(scores, values, out + d, s);
}

// Calls fn.template operator()<R>(first row) over all rows, eight at a time as long as there are so many.
template <int R = kFewRows, typename F>
inline void for_rows(int64_t rows, const F& fn, int64_t first = 0) {
  if constexpr (R > 0) {
    for (; first + R <= rows; first += R) fn.template operator()<R>(first);
    if (first < rows) for_rows<R - 1>(rows, fn, first);
  }
}

inline void apply_softcap(float* scores, int64_t n, float softcap) {
  for (int64_t i = 0; i < n; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
}

// Turns one row's scores of a span, the first of them at position `start`, into weights. Positions outside [first, last]
// weigh 0. Where none is seen the state stays as it is.
inline void softmax_row(float* scores, int64_t n, int64_t start, int64_t first, int64_t last, Partial state, int64_t r) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 most = splat(lowest);
  for (int64_t j = 0; j < n; j += 16) {
    f32x16 score = load_vector<f32x16>(scores + j);
    const int64_t position = start + j;
    if (position < first || position + 15 > last) {
      i32x16 hidden = (lane < static_cast<int32_t>(first - position)) | (lane > static_cast<int32_t>(last - position));
      score = hidden ? splat(lowest) : score;
      store_vector(scores + j, score);
    }
    most = score > most ? score : most;
  }
  const float top = max(most);
  if (top == lowest) {
    std::fill(scores, scores + n, 0.0f);
    return;
  }
  f32x16 total{};
  for (int64_t j = 0; j < n; j += 16) {
    f32x16 p = exp_nonpositive(load_vector<f32x16>(scores + j) - top);
    store_vector(scores + j, p);
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

// Scores of all queries against the blocks of positions [begin, end). Many queries share one conversion of a block to floats;
// few convert as they read, and fetch meanwhile what is read next: a block of keys, then the first one of values.
template <typename T>
void score_blocks(const Queries& queries, const Blocks<T>& blocks, int64_t begin, int64_t end, Scratch& scratch,
                  const AttentionShape& s) {
  const int64_t bs = s.block_size, size = s.head_dim * bs;
  auto score = [&](const auto* keys, int64_t ahead, int64_t start) {
    for_rows(queries.rows, [&]<int R>(int64_t r) {
      score_rows<R>(queries.q + r * s.head_dim, keys, ahead, scratch.scores.data() + r * s.score_stride() + start - begin, s);
    });
  };
  for (int64_t start = begin; start < end; start += bs) {
    const T* keys = blocks.keys(start / bs, s);
    if (queries.rows > kFewRows) {
      floats_from(keys, scratch.keys.data(), size);
      score(scratch.keys.data(), 0, start);
    } else {
      const T* next = start + bs < end ? blocks.keys(start / bs + 1, s) : blocks.values(begin / bs, s);
      score(keys, bytes_between(keys, next), start);
    }
  }
}

// Adds the values of these blocks, weighted, to the state.
template <typename T>
void add_values(const Queries& queries, const Blocks<T>& blocks, int64_t begin, int64_t end, Partial state,
                Scratch& scratch, const AttentionShape& s) {
  const int64_t stride = s.value_stride(), bs = s.block_size;
  auto add = [&](auto values, int64_t start) {
    for_rows(queries.rows, [&]<int R>(int64_t r) {
      value_rows<R>(scratch.scores.data() + r * s.score_stride() + start - begin, values, state.out + r * stride, s);
    });
  };
  for (int64_t start = begin; start < end; start += bs) {
    const T* values = blocks.values(start / bs, s);
    const int64_t num_keys = std::min(bs, end - start);
    if (queries.rows <= kFewRows && stride == s.value_dim) {
      const T* next = start + bs < end ? blocks.values(start / bs + 1, s) : values;
      add(Values<T>{values, stride, num_keys, bytes_between(values, next)}, start);
      continue;
    }
    for (int64_t j = 0; j < num_keys; ++j) {
      float* to = scratch.values.data() + j * stride;
      floats_from(values + j * s.value_dim, to, s.value_dim);
      std::fill(to + s.value_dim, to + stride, 0.0f);
    }
    add(Values<float>{scratch.values.data(), stride, num_keys, 0}, start);
  }
}

// Attention of `queries` over positions [span_start, span_end) of one row and one KV head, into a fresh `state`.
template <typename T>
void attend_span(const Queries& queries, const Blocks<T>& blocks, int64_t span_start, int64_t span_end, Partial state,
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
    softmax_row(row, num_scores, begin, first, std::min(position, span_end - 1), state, r);
  }
  add_values(queries, blocks, begin, end, state, scratch, s);
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
