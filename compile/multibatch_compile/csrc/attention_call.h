// What one call of an attention operator asks for, and how it is cut into tiles.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "paged_attention.h"

namespace multibatch {

// By what queries and new keys are turned: a row of cosines and one of sines for each token.
struct Rotary {
  const void* cos = nullptr;
  const void* sin = nullptr;
  int64_t dims = 0;  // of the head dimension, the first so many; 0: none
};

// The arguments of one paged_attention call in plain C++ terms.
struct Call {
  AttentionShape shape;
  Rotary rotary;
  const int32_t* starts;    // [R + 1]: row r's tokens are [starts[r], starts[r + 1])
  const int32_t* lengths;   // [R]: positions of row r in the pool, its new tokens included
  const int32_t* tables;    // [R, max_blocks]
  const int64_t* slots;     // [T]
  int64_t num_rows, num_tokens;

  // Whether a row has new tokens for several tiles: then those of its end take long, and are handed out one by one.
  bool has_chunk() const {
    for (int64_t r = 0; r < num_rows; ++r)
      if (chunk(r) * shape.group > kTileRows) return true;
    return false;
  }

  int64_t chunk(int64_t row) const { return starts[row + 1] - starts[row]; }
  int64_t position(int64_t row, int64_t token) const { return lengths[row] - starts[row + 1] + token; }

  // Whether this row's only new token goes where it reads it, which no other row of the call does: then the tile that reads it
  // writes it, and nobody waits in between.
  bool writes_itself(int64_t row) const {
    if (chunk(row) != 1) return false;
    const int64_t last = lengths[row] - 1, block = tables[row * shape.max_blocks + last / shape.block_size];
    return slots[starts[row]] == block * shape.block_size + last % shape.block_size;
  }

  // x: a query or key of this token, [head_dim].
  template <typename T>
  void rotate_token(int64_t token, float* x) const {
    const int64_t at = token * rotary.dims;
    if (rotary.dims) rotate(x, static_cast<const T*>(rotary.cos) + at, static_cast<const T*>(rotary.sin) + at, rotary.dims);
  }
};

// One unit of work: some query tokens of a row for one KV head, over spans [first_span, end_span).
struct Tile {
  int32_t row, kv_head, token, num_tokens;
  int64_t first_span, end_span;
  bool is_part;  // of the spans that its only token sees; the next tiles have the others
  bool continues(const Tile& before) const { return is_part && before.token == token && before.kv_head == kv_head; }
};

// Decode rows are split by span, so that few long rows still fill all threads; a prefill chunk has tiles enough.
inline std::vector<Tile> tiles_of(const Call& call) {
  const AttentionShape& s = call.shape;
  const int32_t step = static_cast<int32_t>(std::max<int64_t>(1, kTileRows / s.group));
  std::vector<Tile> tiles;
  for (int32_t r = 0; r < call.num_rows; ++r) {
    const int32_t first = call.starts[r], end = call.starts[r + 1];
    for (int32_t t = first; t < end; t += step)
      for (int32_t h = 0; h < s.num_kv_heads; ++h) {
        const int32_t n = std::min(step, end - t);
        const int64_t seen = s.first_seen(call.position(r, t)) / kSpan, last = call.position(r, t + n - 1) / kSpan;
        const bool is_split = end - first == 1 && last > seen;
        const int64_t each = is_split ? 1 : last + 1 - seen;
        for (int64_t span = seen; span <= last; span += each) tiles.push_back({r, h, t, n, span, span + each, is_split});
      }
  }
  return tiles;
}

// Every index that the kernel will follow, checked before anything is written.
inline void check(const Call& call, int64_t num_blocks) {
  const AttentionShape& s = call.shape;
  for (int64_t t = 0; t < call.num_tokens; ++t)
    TORCH_CHECK(call.slots[t] >= 0 && call.slots[t] < num_blocks * s.block_size, "paged_attention: slot ",
                call.slots[t], " of token ", t, " is outside the pool of ", num_blocks, " blocks of ", s.block_size);
  for (int64_t r = 0; r < call.num_rows; ++r) {
    const int64_t chunk = call.chunk(r);
    TORCH_CHECK(chunk >= 0 && call.starts[r] >= 0 && call.starts[r + 1] <= call.num_tokens,
                "paged_attention: row ", r, " has tokens ", call.starts[r], " to ", call.starts[r + 1], " of ",
                call.num_tokens);
    if (chunk == 0) continue;
    const int64_t length = call.lengths[r];
    TORCH_CHECK(length >= chunk && length <= s.max_blocks * s.block_size, "paged_attention: row ", r, " of ", chunk,
                " new tokens has length ", length, "; allowed: ", chunk, " to ", s.max_blocks * s.block_size);
    for (int64_t b = 0; b < (length + s.block_size - 1) / s.block_size; ++b) {
      const int32_t block = call.tables[r * s.max_blocks + b];
      TORCH_CHECK(block >= 0 && block < num_blocks, "paged_attention: block ", block, " of row ", r,
                  " is outside the pool of ", num_blocks);
    }
  }
}

}  // namespace multibatch
