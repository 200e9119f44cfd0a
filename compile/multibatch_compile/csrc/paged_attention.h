// Causal attention over a paged KV pool: grouped queries, rows of mixed lengths, decode and chunked prefill in one form.
//
// Pool layout per layer: keys [num_blocks, H_kv, D, block_size], values [num_blocks, H_kv, block_size, D_v]; keys are
// stored with positions innermost so that the scores of 16 positions are one vector. Cost follows each row's own length.
// A query's keys are taken in spans of kSpan positions, each with its own softmax, merged in order (as flash-decoding
// does, Dao et al. 2023). Spans do not depend on the batch or the chunk, so neither do the bits of the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numeric.h"

namespace multibatch {

constexpr int64_t kSpan = 256;
constexpr int64_t kTileRows = 64;  // (query token, query head) pairs that share one read of a block

struct AttentionShape {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size, max_blocks;
  float scale, softcap;    // softcap 0: none
  int64_t sliding_window;  // 0: none; else a query sees itself and the window - 1 positions before it
  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t value_stride() const { return (value_dim + 15) / 16 * 16; }
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
    scores.resize(kTileRows * s.block_size);
    q.resize(kTileRows * s.head_dim);
    state.resize(2 * kTileRows * (s.value_stride() + 2));
    positions.resize(kTileRows);
  }
  Partial partial(int which, const AttentionShape& s) {
    float* base = state.data() + which * kTileRows * (s.value_stride() + 2);
    return {base, base + kTileRows, base + 2 * kTileRows};
  }
};

// scores[rows, block_size] = q . keys for R rows at once, so that a key vector is loaded once for all of them.
template <int R>
inline void score_rows(const float* q, const float* keys, float* scores, const AttentionShape& s) {
  for (int64_t j = 0; j < s.block_size; j += 16) {
    f32x16 acc[R] = {};
    for (int64_t d = 0; d < s.head_dim; ++d) {
      f32x16 k = load_vector<f32x16>(keys + d * s.block_size + j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += k * q[r * s.head_dim + d];
    }
    for (int r = 0; r < R; ++r) store_vector(scores + r * s.block_size + j, acc[r]);
  }
}

// out[rows, value_stride] += scores . values for R rows at once.
template <int R>
inline void value_rows(const float* scores, const float* values, float* out, int64_t num_keys, const AttentionShape& s) {
  const int64_t stride = s.value_stride();
  for (int64_t d = 0; d < stride; d += 16) {
    f32x16 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = load_vector<f32x16>(out + r * stride + d);
    for (int64_t j = 0; j < num_keys; ++j) {
      f32x16 v = load_vector<f32x16>(values + j * stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r] += v * scores[r * s.block_size + j];
    }
    for (int r = 0; r < R; ++r) store_vector(out + r * stride + d, acc[r]);
  }
}

// Calls fn.template operator()<R>(first row) over all rows, eight at a time as long as there are so many.
template <int R = 8, typename F>
inline void for_rows(int64_t rows, const F& fn, int64_t first = 0) {
  if constexpr (R > 0) {
    for (; first + R <= rows; first += R) fn.template operator()<R>(first);
    if (first < rows) for_rows<R - 1>(rows, fn, first);
  }
}

inline void apply_softcap(float* scores, int64_t n, float softcap) {
  for (int64_t i = 0; i < n; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
}

// Turns one row's scores of a block into weights and rescales the row's state. Positions outside [first, last] weigh 0.
inline void softmax_row(float* scores, int64_t block_start, int64_t first, int64_t last, Partial state, int64_t r,
                        const AttentionShape& s) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 most = splat(lowest);
  for (int64_t j = 0; j < s.block_size; j += 16) {
    f32x16 score = load_vector<f32x16>(scores + j);
    const int64_t position = block_start + j;
    if (position < first || position + 15 > last) {
      i32x16 hidden = (lane < static_cast<int32_t>(first - position)) | (lane > static_cast<int32_t>(last - position));
      score = hidden ? splat(lowest) : score;
      store_vector(scores + j, score);
    }
    most = score > most ? score : most;
  }
  const float highest = max(most);
  if (highest == lowest) {  // nothing of this block is seen: leave the state's bits alone
    std::fill(scores, scores + s.block_size, 0.0f);
    return;
  }
  const float top = std::max(state.max[r], highest);
  f32x16 total{};
  for (int64_t j = 0; j < s.block_size; j += 16) {
    f32x16 p = exp_nonpositive(load_vector<f32x16>(scores + j) - top);
    store_vector(scores + j, p);
    total += p;
  }
  if (top == state.max[r]) {  // nothing to rescale
    state.sum[r] += sum(total);
    return;
  }
  const float shrink = state.max[r] == lowest ? 0.0f : std::exp(state.max[r] - top);
  state.sum[r] = state.sum[r] * shrink + sum(total);
  state.max[r] = top;
  float* out = state.out + r * s.value_stride();
  for (int64_t d = 0; d < s.value_stride(); ++d) out[d] *= shrink;
}

// Attention of `queries` over positions [span_start, span_end) of one row and one KV head, into a fresh `state`.
template <typename T>
void attend_span(const Queries& queries, const T* key_pool, const T* value_pool, const int32_t* block_table,
                 int64_t kv_head, int64_t span_start, int64_t span_end, Partial state, Scratch& scratch,
                 const AttentionShape& s) {
  const int64_t stride = s.value_stride(), bs = s.block_size;
  std::fill(state.max, state.max + queries.rows, -std::numeric_limits<float>::infinity());
  std::fill(state.sum, state.sum + queries.rows, 0.0f);
  std::fill(state.out, state.out + queries.rows * stride, 0.0f);
  const int64_t last_position = queries.positions[queries.rows - 1];
  const int64_t first_seen = s.sliding_window ? queries.positions[0] - s.sliding_window + 1 : 0;
  const int64_t end = std::min(span_end, last_position + 1);
  for (int64_t start = span_start / bs * bs; start < end; start += bs) {
    if (start + bs <= first_seen) continue;
    const int64_t block = block_table[start / bs];
    const T* keys = key_pool + (block * s.num_kv_heads + kv_head) * s.head_dim * bs;
    const T* values = value_pool + (block * s.num_kv_heads + kv_head) * bs * s.value_dim;
    const int64_t num_keys = std::min(bs, end - start);
    floats_from(keys, scratch.keys.data(), s.head_dim * bs);
    for (int64_t j = 0; j < num_keys; ++j) {
      float* to = scratch.values.data() + j * stride;
      floats_from(values + j * s.value_dim, to, s.value_dim);
      std::fill(to + s.value_dim, to + stride, 0.0f);
    }
    float* scores = scratch.scores.data();
    for_rows(queries.rows, [&]<int R>(int64_t r) {
      score_rows<R>(queries.q + r * s.head_dim, scratch.keys.data(), scores + r * bs, s);
    });
    if (s.softcap != 0.0f) apply_softcap(scores, queries.rows * bs, s.softcap);
    for (int64_t r = 0; r < queries.rows; ++r) {
      const int64_t position = queries.positions[r];
      const int64_t first = std::max(span_start, s.sliding_window ? position - s.sliding_window + 1 : 0);
      softmax_row(scores + r * bs, start, first, std::min(position, span_end - 1), state, r, s);
    }
    for_rows(queries.rows, [&]<int R>(int64_t r) {
      value_rows<R>(scores + r * bs, scratch.values.data(), state.out + r * stride, num_keys, s);
    });
  }
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
