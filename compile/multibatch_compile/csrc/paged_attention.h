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
  // What follows from these, kept because divisions are slow.
  int64_t group = num_heads / num_kv_heads, value_stride = (value_dim + 15) / 16 * 16;
  int64_t score_stride = (kSpan / block_size + 2) * block_size;  // positions of all blocks of a span
  int64_t first_seen(int64_t position) const { return sliding_window ? std::max<int64_t>(0, position - sliding_window + 1) : 0; }
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

// Floats that begin with a cache line.
class Floats {
 public:
  void resize(int64_t n) { memory_.resize((n + 15) / 16); }
  float* data() { return reinterpret_cast<float*>(memory_.data()); }

 private:
  std::vector<f32x16> memory_;
};

// Working memory of one thread, sized once per call.
struct Scratch {
  Floats laid_out, scores, q, row, state;
  std::vector<int64_t> positions;
  void fit(const AttentionShape& s) {
    laid_out.resize(s.score_stride * (s.head_dim + s.value_stride));
    scores.resize(std::max<int64_t>(kFewRows, kRowsAtOnce) * s.score_stride);
    q.resize(kTileRows * s.head_dim);
    row.resize(s.head_dim);
    state.resize(2 * kTileRows * (s.value_stride + 2));
    positions.resize(kTileRows);
  }
  Partial partial(int which, const AttentionShape& s) {
    float* base = state.data() + which * kTileRows * (s.value_stride + 2);
    return {base, base + kTileRows, base + 2 * kTileRows};
  }
};

// `count` lines of keys [head_dim, block_size] or values [num_keys, value_stride], `stride` elements apart, as the pool has them or
// as `lay_out_lines` left them; and how many bytes behind them what is read next begins.
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
    // Not what was laid out as pairs: that lies in one piece, and fetching it made no difference.
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

// Lays lines out as lanes, [lanes_of(count), width].
template <typename Lane, typename T>
void lay_out_lines(const Lines<T>& from, int64_t width, Lane* to) {
  static const T zeros[16] = {};
  for (int64_t l = 0; l < lanes_of<Lane>(from.count); ++l) {
    const T* line = from.data + l * kElements<Lane> * from.stride;
    const bool has_next = l * kElements<Lane> + 1 < from.count;
    for (int64_t j = 0; j < width; j += 16)
      store_vector(to + l * width + j, vector_of<Lane>(line + j, has_next ? line + from.stride + j : zeros));
  }
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

inline void apply_softcap(float* scores, int64_t n, float softcap, float unit) {
  for (int64_t i = 0; i < n; ++i) scores[i] = unit * softcap * std::tanh(scores[i] / softcap);
}

// What scores are measured in: bits where the exponential is 2^x (exp_in_units), else nats.
template <typename T>
constexpr float kUnitsInNat = sizeof(T) == sizeof(float) ? 1.0f : 1.44269504088896341f;

template <typename T>
inline f32x16 exp_in_units(f32x16 x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return exp_nonpositive(x);
  } else {
    return exp2_nonpositive(x);
  }
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
    f32x16 p = exp_in_units<T>(load_vector<f32x16>(scores + j) - top);
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

// The keys of a block; what is read after them is the next block's or the first block of values.
template <typename T>
MULTIBATCH_INLINE Lines<T> keys_of(const Blocks<T>& blocks, int64_t start, int64_t begin, int64_t end, const AttentionShape& s) {
  const int64_t bs = s.block_size;
  const T* data = blocks.keys(start / bs, s);
  const T* next = start + bs < end ? blocks.keys(start / bs + 1, s) : blocks.values(begin / bs, s);
  return {data, s.head_dim, bs, bytes_between(data, next)};
}

// scores[R, block] = q[R, head_dim] . keys[head_dim, block], scaled.
template <int R, typename T, typename E>
MULTIBATCH_INLINE void score_rows(const Lane<T>* q, const Lines<E>& keys, float* scores, const AttentionShape& s) {
  const int64_t lanes = lanes_of<Lane<T>>(s.head_dim), stride = s.score_stride;
  const float scale = s.scale * (s.softcap != 0.0f ? 1.0f : kUnitsInNat<T>);
  for_vectors(s.block_size, [&]<int J>(int64_t j) {
    f32x16 sums[R][J] = {};
    add_products(q, lanes, from_column(keys, j), sums);
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < J; ++v) store_vector(scores + i * stride + j + 16 * v, sums[i][v] * scale);
  });
}

// The values of a block. Where they do not fill vectors, a copy of them that does.
template <typename T>
Lines<T> values_of(const Blocks<T>& blocks, int64_t start, int64_t end, const AttentionShape& s) {
  const int64_t bs = s.block_size, count = std::min(bs, end - start), stride = s.value_stride;
  const T* data = blocks.values(start / bs, s);
  if (stride == s.value_dim)
    return {data, count, stride, start + bs < end ? bytes_between(data, blocks.values(start / bs + 1, s)) : 0};
  static thread_local std::vector<T> copy;
  copy.assign(count * stride, T(0.0f));
  for (int64_t k = 0; k < count; ++k) std::copy_n(data + k * s.value_dim, s.value_dim, copy.data() + k * stride);
  return {copy.data(), count, stride, 0};
}

// Adds the elements [d, d + 16 J) of these values, by these weights of R rows, to `out`.
template <int R, int J, typename Lane, typename E>
MULTIBATCH_INLINE void add_columns(const Lane* weights, const Lines<E>& values, float* out, const AttentionShape& s) {
  const int64_t stride = s.value_stride;
  f32x16 sums[R][J];
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < J; ++v) sums[i][v] = load_vector<f32x16>(out + i * stride + 16 * v);
  add_products(weights, s.score_stride, values, sums);
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < J; ++v) store_vector(out + i * stride + 16 * v, sums[i][v]);
}

// Positions [start, stop) of a row, and those blocks of them, [begin, end), that its queries see.
struct Span {
  int64_t start, stop, begin, end, num_scores;
  Span(int64_t number, const int64_t* positions, int64_t rows, const AttentionShape& s)
      : start(number * kSpan), stop(start + kSpan),
        begin(std::max(start, s.first_seen(positions[0])) / s.block_size * s.block_size),
        end(std::min(stop, positions[rows - 1] + 1)),
        num_scores(std::max<int64_t>(0, (end - begin + s.block_size - 1) / s.block_size * s.block_size)) {}
};

// Turns the scores of these rows into weights.
template <typename T>
void softmax_rows(const Span& span, const int64_t* positions, int64_t rows, float* scores, Partial state, int64_t first_row,
                  const AttentionShape& s) {
  for (int64_t r = 0; r < rows; ++r, scores += s.score_stride) {
    if (s.softcap != 0.0f) apply_softcap(scores, span.num_scores, s.softcap, kUnitsInNat<T>);
    const int64_t position = positions[first_row + r];
    const int64_t first = std::max(span.start, s.first_seen(position));
    softmax_row<T>(scores, span.num_scores, span.begin, first, std::min(position, span.stop - 1), state, first_row + r);
  }
}

// Few rows take blocks as they are, and fetch meanwhile what is read next.
template <typename T>
void attend_few(const Queries<Lane<T>>& queries, const Blocks<T>& blocks, const Span& span, Partial state, Scratch& scratch,
                const AttentionShape& s) {
  const int64_t bs = s.block_size, lanes = lanes_of<Lane<T>>(s.head_dim);
  float* const scores = scratch.scores.data();
  for (int64_t start = span.begin; start < span.end; start += bs) {
    const Lines<T> keys = keys_of(blocks, start, span.begin, span.end, s);
    for_rows(queries.rows, [&]<int R>(int64_t r) {
      score_rows<R, T>(queries.q + r * lanes, keys, scores + r * s.score_stride + start - span.begin, s);
    });
  }
  softmax_rows<T>(span, queries.positions, queries.rows, scores, state, 0, s);
  const Lane<T>* weights = reinterpret_cast<const Lane<T>*>(scores);
  for (int64_t start = span.begin; start < span.end; start += bs) {
    const Lines<T> values = values_of(blocks, start, span.end, s);
    for_vectors(s.value_stride, [&]<int J>(int64_t d) {
      for_rows(queries.rows, [&]<int R>(int64_t r) {
        add_columns<R, J>(weights + r * s.score_stride, from_column(values, d), state.out + r * s.value_stride + d, s);
      });
    });
    weights += lanes_of<Lane<T>>(values.count);
  }
}

// Keys and values of a span as many queries read them: keys [blocks, lanes_of(head_dim), block_size], and values, those columns
// side by side that are taken at once, [columns, lanes_of(score_stride), 16 J].
template <typename Lane>
struct LaidOut {
  const Lane *keys, *values;
  int64_t begin;  // the position of the first of them
};

template <typename Lane>
int64_t laid_out_lanes(const AttentionShape& s) {
  return lanes_of<Lane>(s.head_dim) * s.score_stride + lanes_of<Lane>(s.score_stride) * s.value_stride;
}

template <typename T>
LaidOut<Lane<T>> lay_out_span(const Blocks<T>& blocks, int64_t begin, int64_t end, Lane<T>* memory, const AttentionShape& s) {
  const int64_t bs = s.block_size, lanes = lanes_of<Lane<T>>(s.head_dim), most = lanes_of<Lane<T>>(s.score_stride);
  Lane<T>* const values_memory = memory + lanes * s.score_stride;
  for (int64_t start = begin; start < end; start += bs) {
    lay_out_lines(keys_of(blocks, start, begin, end, s), bs, memory + (start - begin) * lanes);
    const Lines<T> values = values_of(blocks, start, end, s);
    for_vectors(s.value_stride, [&]<int J>(int64_t d) {
      lay_out_lines(from_column(values, d), 16 * J, values_memory + d * most + 16 * J * lanes_of<Lane<T>>(start - begin));
    });
  }
  return {memory, values_memory, begin};
}

// Many rows go through what was laid out a few at a time, whose scores stay in the first cache. Sums stay in registers from the
// first block to the last.
template <typename T>
void attend_many(const Queries<Lane<T>>& queries, const LaidOut<Lane<T>>& from, const Span& span, Partial state, Scratch& scratch,
                 const AttentionShape& s) {
  const int64_t bs = s.block_size, lanes = lanes_of<Lane<T>>(s.head_dim), most = lanes_of<Lane<T>>(s.score_stride);
  const int64_t skipped = lanes_of<Lane<T>>(span.begin - from.begin), count = lanes_of<Lane<T>>(span.end - span.begin);
  float* const scores = scratch.scores.data();
  for_rows(queries.rows, [&]<int R>(int64_t r) {
    for (int64_t at = span.begin; at < span.end; at += bs) {
      const Lines<Lane<T>> keys{from.keys + (at - from.begin) * lanes, lanes, bs, 0};
      score_rows<R, T>(queries.q + r * lanes, keys, scores + at - span.begin, s);
    }
    softmax_rows<T>(span, queries.positions, R, scores, state, r, s);
    for_vectors(s.value_stride, [&]<int J>(int64_t d) {
      const Lines<Lane<T>> values{from.values + d * most + 16 * J * skipped, count, 16 * J, 0};
      add_columns<R, J>(reinterpret_cast<const Lane<T>*>(scores), values, state.out + r * s.value_stride + d, s);
    });
  });
}

// Attention of `queries` over one span of a row and a KV head, into a fresh `state`. `shared`: the span as it was laid out for
// several tiles, or null.
template <typename T>
void attend_span(const Queries<Lane<T>>& queries, const Blocks<T>& blocks, const LaidOut<Lane<T>>* shared, int64_t number,
                 Partial state, Scratch& scratch, const AttentionShape& s) {
  std::fill(state.max, state.max + queries.rows, -std::numeric_limits<float>::infinity());
  std::fill(state.sum, state.sum + queries.rows, 0.0f);
  std::fill(state.out, state.out + queries.rows * s.value_stride, 0.0f);
  const Span span(number, queries.positions, queries.rows, s);
  if (queries.rows <= kFewRows) return attend_few(queries, blocks, span, state, scratch, s);
  if (shared) return attend_many<T>(queries, *shared, span, state, scratch, s);
  auto* const memory = reinterpret_cast<Lane<T>*>(scratch.laid_out.data());
  attend_many<T>(queries, lay_out_span(blocks, span.begin, span.end, memory, s), span, state, scratch, s);
}

// Adds the state of the next span to `total`, row by row. A span that saw nothing changes no bit.
template <typename T>
inline void merge(Partial total, Partial next, int64_t rows, int64_t stride) {
  const float lowest = -std::numeric_limits<float>::infinity();
  for_sixteens(rows, [&](int64_t first, int64_t live) {
    const f32x16 before = floats_of(total.max + first, live), after = floats_of(next.max + first, live);
    const f32x16 top = select(after > before, after, before);
    const f32x16 a = select(before == lowest, f32x16{}, exp_in_units<T>(before - top));
    const f32x16 b = select(after == lowest, f32x16{}, exp_in_units<T>(after - top));
    store_floats(floats_of(total.sum + first, live) * a + floats_of(next.sum + first, live) * b, total.sum + first, live);
    store_floats(top, total.max + first, live);
    for (int64_t i = 0; i < live; ++i) {
      if (next.max[first + i] == lowest) continue;
      float* to = total.out + (first + i) * stride;
      const float* from = next.out + (first + i) * stride;
      const float by = a[i], of_next = b[i];
      for (int64_t d = 0; d < stride; d += 16)
        store_vector(to + d, load_vector<f32x16>(to + d) * by + load_vector<f32x16>(from + d) * of_next);
    }
  });
}

}  // namespace multibatch
