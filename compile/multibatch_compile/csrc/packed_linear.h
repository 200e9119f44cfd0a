// y = x W^T + b with W packed once into panels of 32 outputs, for few rows (decode) and many (prefill).
//
// Layout of W (multibatch_compile/packing.py writes it), N and K rounded up with zeros: float32 and float16
// [N/32, K, 32], bfloat16 [N/32, K/2, 32, 2], int8 [N/32, K/4, 32, 4], int4 [N/32, K/64, 2, 576], where 576 bytes are
// 32 inputs with their scales (Nibbles in panel_product.h). A panel is one contiguous stream.
// x is laid out anew for each call, [chunks of kChunk lanes, rows, kChunkStride], so that the micro-kernel finds every row
// at a fixed distance from the first, and a thread writes whole cache lines of its own.
// Each output adds its K products in one order whatever the number of rows, so a row's result has the same bits in
// every batch size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "caches.h"
#include "elementwise.h"
#include "panel_product.h"

namespace multibatch {

// Where activation(gate) * up goes, of outputs that are [gate, up], rounded to T: rows of E, in stretches of `stretch` numbers,
// `stretch_stride` apart. E: T, or float where the next layer reads floats.
template <typename W, typename T>
struct GatedOutputs {
  using E = std::conditional_t<std::is_same_v<typename Format<W>::Lane, float>, float, T>;
  E* rows = nullptr;  // null: outputs are stored as they are
  int64_t row_stride = 0, stretch = 1, stretch_stride = 0;
  Activation activation = Activation::silu;
  E* at(int64_t row, int64_t i) const { return rows + i / stretch * stretch_stride + row * row_stride + i % stretch; }
};

// One call of the operator. T: dtype of x, b and y; W: of the packed weight, T, int8_t or Nibbles.
template <typename W, typename T>
struct LinearCall {
  using Lane = typename Format<W>::Lane;
  using Sum = std::conditional_t<std::is_same_v<W, Nibbles>, float, int32_t>;
  const W* packed;
  const T* bias;           // [N] or null
  const float* scales;     // int8: [N], weight = scale * byte
  const Sum* sums;         // int8: [N], the sum of an output's bytes; int4: of its weights
  const Lane* x;           // [chunks, M, kChunkStride]
  const float* x_scales;   // int8 and int4: [M]
  const T* residual;       // [M, N] or null: added to y, which was rounded to T before
  T* y;                    // [M, N]
  int64_t M, N, units;
  GatedOutputs<W, T> gated = {};  // instead of y
};

constexpr int64_t kBlockGroups = 8;  // of rows, at most, in a tile of many

// From the sums of a group of rows over a panel to those over the next panel of the tile.
constexpr int64_t kPanelSums = kBlockGroups * kMaxRows * 2;

// Rows of a call in groups of nearly equal size.
struct Groups {
  int64_t num_rows, count;
  explicit Groups(int64_t m) : num_rows(m), count((m + kMaxRows - 1) / kMaxRows) {}
  bool are_many() const { return count > 2; }
  int64_t start(int64_t g) const { return g * (num_rows / count) + std::min(g, num_rows % count); }
  int size(int64_t g) const { return static_cast<int>(start(g + 1) - start(g)); }
};

// What belongs to a panel's outputs, n or more of them; zeros where there are fewer.
template <typename V, typename E>
inline void outputs_of(const E* from, int64_t n, V (&to)[2]) {
  if (n >= kPanel) {
    std::memcpy(to, from, sizeof(to));
  } else {
    to[0] = to[1] = V{};
    std::memcpy(to, from, n * sizeof(E));
  }
}

// Sums of rows of a panel as numbers, sixteen at a time, before the bias.
template <typename W, typename T>
struct SumsOf {
  const f32x16* sums;  // [rows][2]
  SumsOf(const LinearCall<W, T>&, int64_t, int64_t, const f32x16* sums) : sums(sums) {}
  f32x16 operator()(int r, int half) const { return sums[2 * r + half]; }
};
template <typename T>
struct SumsOf<int8_t, T> {
  const i32x16* sums;
  const float* x_scales;  // of these rows
  f32x16 scales[2];
  i32x16 shifts[2];
  SumsOf(const LinearCall<int8_t, T>& c, int64_t panel, int64_t row, const i32x16* sums)
      : sums(sums), x_scales(c.x_scales + row) {
    outputs_of(c.scales + panel * kPanel, c.N - panel * kPanel, scales);
    outputs_of(c.sums + panel * kPanel, c.N - panel * kPanel, shifts);
  }
  f32x16 operator()(int r, int half) const {
    const i32x16 exact = sums[2 * r + half] - (shifts[half] << 7);  // x was 128 too large
    return numbers_as<f32x16>(exact) * (scales[half] * x_scales[r]);
  }
};

template <typename T>
struct SumsOf<Nibbles, T> {
  const f32x16* sums;
  const float* x_scales;
  f32x16 shifts[2];
  SumsOf(const LinearCall<Nibbles, T>& c, int64_t panel, int64_t row, const f32x16* sums) : sums(sums), x_scales(c.x_scales + row) {
    outputs_of(c.sums + panel * kPanel, c.N - panel * kPanel, shifts);
  }
  // The weights were 16 times too large, and x 128 too large.
  f32x16 operator()(int r, int half) const { return (sums[2 * r + half] * 0.0625f - shifts[half] * 128.0f) * x_scales[r]; }
};

// Where outputs of a panel lie, rows `stride` apart, and what is added to them.
template <typename T>
struct PanelOutputs {
  const T *bias, *residual;  // or null
  T* y;
  int64_t stride;
};

template <typename T, typename Sums>
inline void store_rows(const PanelOutputs<T>& to, int rows, const Sums& sums) {
  f32x16 bias[2] = {};
  if (to.bias) bias[0] = floats_of(to.bias), bias[1] = floats_of(to.bias + 16);
  for (int r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half) {
      const int64_t at = r * to.stride + 16 * half;
      f32x16 value = sums(r, half) + bias[half];
      if (to.residual) value = rounded<T>(value) + floats_of(to.residual + at);
      store_floats(value, to.y + at);
    }
}

// The same for rows [row, row + rows) of the last panel of a call, which has fewer outputs than others: by way of a copy.
template <typename W, typename T>
void store_last_rows(const LinearCall<W, T>& c, int64_t first, int64_t row, int rows, const SumsOf<W, T>& sums) {
  T bias[kPanel] = {}, residual[kMaxRows * kPanel] = {}, y[kMaxRows * kPanel];
  const int64_t n = c.N - first;
  if (c.bias) std::copy_n(c.bias + first, n, bias);
  for (int r = 0; c.residual && r < rows; ++r) std::copy_n(c.residual + (row + r) * c.N + first, n, residual + r * kPanel);
  store_rows<T>({bias, c.residual ? residual : nullptr, y, kPanel}, rows, sums);
  for (int r = 0; r < rows; ++r) std::copy_n(y + r * kPanel, n, c.y + (row + r) * c.N + first);
}

// activation(gate) * up, each rounded to T on the way, of a panel of each.
template <typename W, typename T>
inline void store_gated_rows(const LinearCall<W, T>& c, int64_t panel, int64_t row, int rows, const SumsOf<W, T>& gates,
                             const SumsOf<W, T>& ups) {
  const int64_t first = panel * kPanel;
  f32x16 biases[2][2] = {};
  for (int half = 0; c.bias && half < 2; ++half) {
    biases[0][half] = floats_of(c.bias + first + 16 * half);
    biases[1][half] = floats_of(c.bias + c.N / 2 + first + 16 * half);
  }
  auto* to = c.gated.at(row, first);
  for (int r = 0; r < rows; ++r, to += c.gated.row_stride) {
    for (int half = 0; half < 2; ++half) {
      const f32x16 gate = rounded<T>(gates(r, half) + biases[0][half]), up = rounded<T>(ups(r, half) + biases[1][half]);
      const f32x16 product = gated_product<T>(gate, up, c.gated.activation);
      if constexpr (std::is_same_v<typename GatedOutputs<W, T>::E, T>) {
        store_floats(product, to + 16 * half);
      } else {
        store_floats(rounded<T>(product), to + 16 * half);
      }
    }
  }
}

// Stores the rows whose sums, [rows][2], are complete. Once for many products, and no part of the loop that makes them.
template <typename W, typename T>
__attribute__((noinline)) void finish_rows(const LinearCall<W, T>& c, int64_t panel, int64_t row, int rows,
                                           const typename Format<W>::Acc* sums) {
  const int64_t first = panel * kPanel, at = row * c.N + first, half = c.N / 2 / kPanel;
  if (c.gated.rows) {
    if (panel < half) return;  // its sums wait for those of the other half
    const SumsOf<W, T> gates(c, panel - half, row, sums - kPanelSums), ups(c, panel, row, sums);
    return store_gated_rows(c, panel - half, row, rows, gates, ups);
  }
  const SumsOf<W, T> numbers(c, panel, row, sums);
  if (c.N - first < kPanel) return store_last_rows(c, first, row, rows, numbers);
  store_rows<T>({c.bias ? c.bias + first : nullptr, c.residual ? c.residual + at : nullptr, c.y + at, c.N}, rows, numbers);
}

// Units [from, to) of one panel, all of them, some chunks or a range within one chunk; and what to fetch meanwhile.
template <int Reads>
struct Range {
  int64_t panel, from, to;
  Ahead<Reads> ahead;
};

// Where a unit of a panel begins.
template <typename W, typename T>
const char* weights_at(const LinearCall<W, T>& c, int64_t panel, int64_t unit) {
  return reinterpret_cast<const char*>(c.packed) + (panel * c.units + unit) * kUnitBytes<W>;
}

// Has what finish_rows reads of a panel on its way: no cache holds it, and the weights would stand still meanwhile. Always inline:
// a function that only fetches has no effect by GCC's reckoning (12), which drops calls of it.
template <typename W, typename T>
MULTIBATCH_INLINE void fetch_ends(const LinearCall<W, T>& c, int64_t panel, int64_t row, int rows) {
  const int64_t first = panel * kPanel;
  for (int64_t i = first; i < first + kPanel; i += 64 / sizeof(float)) {
    if (c.bias) __builtin_prefetch(c.bias + i);
    if constexpr (std::is_same_v<W, int8_t>) __builtin_prefetch(c.scales + i);
    if constexpr (kQuantized<W>) __builtin_prefetch(c.sums + i);
  }
  for (int r = 0; c.residual && r < rows; ++r) __builtin_prefetch(c.residual + (row + r) * c.N + first);
}

// A range for one group of R rows. `carry`, [R][2], holds the group's sums between two ranges.
template <int R, int Reads, typename W, typename T>
void panel_rows(const LinearCall<W, T>& c, const Range<Reads>& range, int64_t row, typename Format<W>::Acc* carry) {
  using Acc = typename Format<W>::Acc;
  constexpr int lanes = Format<W>::lanes, J = kPanelVectors<R>;
  constexpr int64_t chunk_units = kChunk / lanes;
  const int64_t from = range.from, to = range.to;
  if (to == c.units) fetch_ends(c, range.panel, row, R);
  const char* w = weights_at(c, range.panel, from);
  Ahead<Reads> ahead = range.ahead;
  // Adds the products of some units within a chunk to the sums of J vectors.
  auto add = [&](int64_t u, int first, auto& ahead, Acc (&acc)[R][J]) {
    const typename Format<W>::Lane* x = c.x + (u / chunk_units * c.M + row) * kChunkStride + u % chunk_units * lanes;
    const char* at = w + (u - from) * kUnitBytes<W>;
    panel_product(reinterpret_cast<const W*>(at), first, x, std::min(chunk_units, to - u), ahead, acc);
  };
  if constexpr (J == 2) {
    Acc acc[R][2];
    // Unrolled, or the sums would live in memory.
#pragma GCC unroll 24
    for (int i = 0; i < 2 * R; ++i) acc[i / 2][i % 2] = from ? load_vector<Acc>(carry + i) : Acc{};
    for (int64_t u = from; u < to; u += chunk_units) add(u, 0, ahead, acc);
#pragma GCC unroll 24
    for (int i = 0; i < 2 * R; ++i) store_vector(carry + i, acc[i / 2][i % 2]);
  } else {
    for (int64_t u = from; u == from || u < to; u += chunk_units)
      for (int half = 0; half < 2; ++half) {
        Acc acc[R][1];
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) acc[r][0] = u ? load_vector<Acc>(carry + 2 * r + half) : Acc{};
        NothingAhead nothing;  // the first pass has fetched for both
        if (u < to && half == 0) add(u, half, ahead, acc);
        if (u < to && half == 1) add(u, half, nothing, acc);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) store_vector(carry + 2 * r + half, acc[r][0]);
      }
  }
  if (to == c.units) finish_rows(c, range.panel, row, R, carry);
}

template <int R = kMaxRows, int Reads, typename W, typename T>
void panel_rows_of(int rows, const LinearCall<W, T>& c, const Range<Reads>& range, int64_t row,
                   typename Format<W>::Acc* carry) {
  // Of three groups and more, which read weights again, none is smaller.
  constexpr int fewest = Reads == kReadAgain ? (2 * kMaxRows + 1) / 3 : 1;
  if constexpr (R >= fewest) {
    if (rows == R) return panel_rows<R>(c, range, row, carry);
    panel_rows_of<R - 1>(rows, c, range, row, carry);
  }
}

// How a call is cut into tiles. One group of rows: a panel each, read once from end to end. Two: some panels each; the
// second group follows the first over a short range, and each of them fetches half of the next range from memory, which
// else would rest while the second computes. Many: a block of rows by a few panels (of gate and up, one of each), over ranges
// that keep both in the core's own caches, each group fetching its share of the range that comes next. Short ranges cost: at
// each end the sums are put down and taken up.
//
// Tiles of many rows that share panels follow each other, so that weights come from memory once and evenly. But where all of x is
// more than a core's cache holds, tiles that share a block of rows follow each other. Such a block stays in that cache, or, if
// the rows are long, the units of a range do, and each group fetches its share of those that come next.
struct Tiling {
  static constexpr int64_t kBlockPanels = 4, kPairPanels = 2, kFewTiles = 128;
  Groups groups;
  int64_t panels, panels_per_tile, row_blocks = 1;
  bool rows_stay = false;
  // row_bytes: of a row of x as it is laid out.
  Tiling(int64_t m, int64_t n, bool gated, int64_t row_bytes) : groups(m), panels((n + kPanel - 1) / kPanel) {
    panels_per_tile = groups.count == 1 ? 1 : kPairPanels;
    if (!tiles_are_long()) return;
    rows_stay = m * row_bytes > second_level_cache() * 3 / 2;
    row_blocks = (groups.count + kBlockGroups - 1) / kBlockGroups;
    if (gated) return;
    if (rows_stay) panels_per_tile = kBlockPanels;
    while (panels_per_tile > 1 && count() < kFewTiles) panels_per_tile /= 2;  // the last tiles end together
  }
  bool tiles_are_long() const { return groups.are_many(); }
  int64_t panel_tiles() const { return (panels + panels_per_tile - 1) / panels_per_tile; }
  int64_t count() const { return panel_tiles() * row_blocks; }
  int64_t block_of(int64_t tile) const { return rows_stay ? tile / panel_tiles() : tile % row_blocks; }
  int64_t panel_tile_of(int64_t tile) const { return rows_stay ? tile % panel_tiles() : tile / row_blocks; }
  // Of the tile after this one.
  int64_t next_panel_tile(int64_t tile) const {
    if (rows_stay) return (panel_tile_of(tile) + 1) % panel_tiles();
    return std::min(panel_tile_of(tile) + (block_of(tile) + 1 == row_blocks), panel_tiles() - 1);
  }
  // Units in a range of a block of so many groups: all, where a cache holds them with the rows, or those of a chunk.
  template <typename W>
  int64_t block_units(int64_t units, int64_t num_groups) const {
    constexpr int64_t lane = Format<W>::lanes * sizeof(typename Format<W>::Lane);
    const int64_t bytes = num_groups * kMaxRows * lane + panels_per_tile * kUnitBytes<W>;
    return units * bytes <= second_level_cache() * 2 / 3 ? std::max<int64_t>(units, 1) : kChunk / Format<W>::lanes;
  }
};

template <typename Acc>
Acc* carries() {
  static thread_local std::vector<Acc> memory(Tiling::kBlockPanels * kBlockGroups * kMaxRows * 2);
  return memory.data();
}

template <typename W, typename T>
void pair_tile(const LinearCall<W, T>& c, const Tiling& tiling, int64_t p0, int64_t p1) {
  using Acc = typename Format<W>::Acc;
  constexpr int64_t unit = kUnitBytes<W>, step = unit / kFetches<W>, length = Format<W>::range, bytes = length * unit;
  static_assert(kChunk / Format<W>::lanes % length == 0);  // a range lies within one chunk
  Acc* const carry = carries<Acc>();
  for (int64_t p = p0; p < p1; ++p)
    for (int64_t from = 0; from == 0 || from < c.units; from += length)
      for (int64_t g = 0; g < 2; ++g) {
        // Halves, and not every other line: cores fetch pairs of lines, and the second group would find all of it there.
        const char* const next = weights_at(c, p, from) + bytes + g * bytes / 2;
        const Range<kReadOnce> range{p, from, std::min(from + length, c.units), {next, next, step / 2, step / 2}};
        panel_rows_of(tiling.groups.size(g), c, range, tiling.groups.start(g), carry + g * kMaxRows * 2);
      }
}

template <typename W, typename T>
void single_tile(const LinearCall<W, T>& c, const Tiling& tiling, int64_t p0, int64_t p1) {
  constexpr int64_t step = kUnitBytes<W> / kFetches<W>;
  for (int64_t p = p0; p < p1; ++p) {
    const char* const soon = weights_at(c, p, 0) + kPrefetchBytes;
    const Range<kReadOnce> range{p, 0, c.units, {soon, soon + 64, step, step}};
    panel_rows_of(tiling.groups.size(0), c, range, 0, carries<typename Format<W>::Acc>());
  }
}

// Every `step`th of the panels [p0, p1) by groups [g0, g1). `next_panel`: with which the tile after this one begins.
template <typename W, typename T>
void block_tile(const LinearCall<W, T>& c, const Tiling& tiling, int64_t p0, int64_t p1, int64_t step, int64_t g0, int64_t g1,
                int64_t next_panel) {
  using Lane = typename Format<W>::Lane;
  constexpr int64_t unit = kUnitBytes<W>, fetches = kFetches<W>, chunk_units = kChunk / Format<W>::lanes;
  typename Format<W>::Acc* const carry = carries<typename Format<W>::Acc>();
  const int64_t length = tiling.template block_units<W>(c.units, g1 - g0), row = tiling.groups.start(g0);
  const int64_t passes = (p1 - p0 + step - 1) / step * (g1 - g0), row_bytes = kChunkStride * sizeof(Lane);
  const int64_t row_share = (tiling.groups.start(g1) - row) * row_bytes / passes;
  for (int64_t from = 0; from == 0 || from < c.units; from += length) {
    const int64_t to = std::min(from + length, c.units), fetched = std::max<int64_t>((to - from) * fetches, 1);
    const char* next_rows = reinterpret_cast<const char*>(c.x + ((to < c.units ? to / chunk_units : 0) * c.M + row) * kChunkStride);
    for (int64_t p = p0; p < p1; p += step) {
      // What is multiplied next: another panel over these units, then the first one over more, then the next tile's.
      const bool is_last = p + step >= p1, is_end = is_last && to == c.units;
      const int64_t then = is_end ? 0 : is_last ? to : from, panel = is_end ? next_panel : is_last ? p0 : p + step;
      const int64_t share = (std::min(then + length, c.units) - then) * unit / (g1 - g0);
      const char *soon = weights_at(c, p, from) + kPrefetchBytes, *next = weights_at(c, panel, then);
      for (int64_t g = g0; g < g1; ++g, next += share, next_rows += row_share) {
        Range<kReadAgain> range{p, from, to, {next_rows, next, row_share / fetched + 1, share / fetched + 1}};
        // The rows stay: of the group's own weights every other line, since they lie in the core's cache but for the first group.
        if (length >= c.units) range.ahead.first = soon, range.ahead.first_step = unit / fetches;
        typename Format<W>::Acc* held = carry + (p - p0) / step * kPanelSums + (g - g0) * kMaxRows * 2;
        panel_rows_of(tiling.groups.size(g), c, range, tiling.groups.start(g), held);
      }
    }
  }
}

template <typename W, typename T>
void linear_tile(const LinearCall<W, T>& c, const Tiling& tiling, int64_t tile) {
  const int64_t count = tiling.groups.count, nth = tiling.panel_tile_of(tile);
  const int64_t p0 = nth * tiling.panels_per_tile, p1 = std::min(p0 + tiling.panels_per_tile, tiling.panels);
  if (count == 1) return single_tile(c, tiling, p0, p1);
  if (count == 2) return pair_tile(c, tiling, p0, p1);
  const int64_t block = tiling.block_of(tile), next = tiling.next_panel_tile(tile);
  const int64_t g0 = block * count / tiling.row_blocks, g1 = (block + 1) * count / tiling.row_blocks;
  if (!c.gated.rows) return block_tile(c, tiling, p0, p1, 1, g0, g1, next * tiling.panels_per_tile);
  const int64_t half = tiling.panels / 2;
  block_tile(c, tiling, nth, nth + half + 1, half, g0, g1, next);
}

// Lays one row of x, [K], out for the micro-kernel: lane l goes to out[l / kChunk][l % kChunk], chunks `distance` apart.
template <typename W, typename T>
void pack_row(const T* x, int64_t K, int64_t num_lanes, float* out, int64_t distance) {
  for (int64_t k = 0; k < num_lanes; k += kChunk, out += distance) {
    const int64_t n = std::min(kChunk, num_lanes - k), live = std::clamp<int64_t>(K - k, 0, n);
    convert(x + k, out, live);
    std::fill(out + live, out + n, 0.0f);
  }
}

// Pairs of bfloat16, for the dot product.
template <typename W, typename T>
void pack_row(const T* x, int64_t K, int64_t num_lanes, uint32_t* out, int64_t distance) {
  for (int64_t u = 0; u < num_lanes; u += kChunk, out += distance) {
    const int64_t n = std::min(kChunk, num_lanes - u), live = std::clamp<int64_t>(K - 2 * u, 0, 2 * n);
    out[n - 1] = 0;
    std::memcpy(out, x + 2 * u, live * sizeof(T));
  }
}

// Symmetric scale of one row: its largest magnitude becomes 127. NaN where the row is not finite, so that what follows is.
template <typename T>
float row_scale(const T* x, int64_t K) {
  f32x16 largest{};
  i32x16 wrong{};
  for_sixteens(K, [&](int64_t k, int64_t live) {
    const f32x16 v = floats_of(x + k, live), magnitude = select(v < 0.0f, -v, v);
    wrong |= ~(magnitude <= std::numeric_limits<float>::max());
    largest = select(magnitude > largest, magnitude, largest);
  });
  return any(wrong) ? std::numeric_limits<float>::quiet_NaN() : max(largest) / 127.0f;
}

// Rounds half to even by adding 1.5 * 2^23, whose last bits then hold the integer. Divides, and does not multiply by the
// inverse: numbers of few bits lie between two integers often, and must go where the reference sends them.
template <typename T>
void quantize_row(const T* x, int64_t K, int64_t units, float scale, uint32_t* out, int64_t distance) {
  using bytes = Vector<uint8_t, 16>;
  static_assert(kChunk % 4 == 0);  // units of a vector
  for (int64_t u = 0; u < units; u += kChunk, out += distance)
    for_sixteens(4 * std::min(kChunk, units - u), [&](int64_t i, int64_t live) {
      const f32x16 v = floats_of(x + 4 * u + i, std::clamp<int64_t>(K - 4 * u - i, 0, live));
      const f32x16 shifted = v / scale + 12582912.0f;
      const bytes all = numbers_as<bytes>(bits_as<u32x16>(shifted) + 128u);
      std::memcpy(reinterpret_cast<char*>(out) + i, &all, live);
    });
}

}  // namespace multibatch
