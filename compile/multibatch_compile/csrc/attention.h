// Attention as operators: checks, tiles and threads. The arithmetic is in paged_attention.h.
#pragma once

#include "call.h"
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
      if ((starts[r + 1] - starts[r]) * shape.group() > kTileRows) return true;
    return false;
  }

  // Whether this row's only new token goes where it reads it, which no other row of the call does: then the tile that reads it
  // writes it, and nobody waits in between.
  bool writes_itself(int64_t row) const {
    if (starts[row + 1] - starts[row] != 1) return false;
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

// One unit of work: some query tokens of a row for one KV head, over one span or (span < 0) all spans in turn.
struct Tile {
  int32_t row, kv_head, token, num_tokens, span;
};

// One head of a token, any distance apart, as floats.
template <typename T>
void head_to_floats(const T* from, int64_t stride, float* to, int64_t n) {
  if (stride == 1) return convert(from, to, n);
  for (int64_t d = 0; d < n; ++d) to[d] = to_float(from[d * stride]);
}

// Keys and values of a call's new tokens, and the pool that they go to.
template <typename T>
struct NewTokens {
  const Call& call;
  const at::Tensor &key, &value;
  T *key_pool, *value_pool;

  void write(int64_t token, int64_t head) const {
    const AttentionShape& s = call.shape;
    const int64_t block = call.slots[token] / s.block_size, offset = call.slots[token] % s.block_size;
    const T* k_from = reinterpret_cast<const T*>(key.const_data_ptr()) + head * key.stride(1) + token * key.stride(2);
    const T* v_from = reinterpret_cast<const T*>(value.const_data_ptr()) + head * value.stride(1) + token * value.stride(2);
    T* k_to = key_pool + (block * s.num_kv_heads + head) * s.head_dim * s.block_size + offset;
    T* v_to = value_pool + ((block * s.num_kv_heads + head) * s.block_size + offset) * s.value_dim;
    float* rotated = row_buffer<float>(s.head_dim);
    head_to_floats(k_from, key.stride(3), rotated, s.head_dim);
    call.rotate_token<T>(token, rotated);
    for (int64_t d = 0; d < s.head_dim; ++d) k_to[d * s.block_size] = static_cast<T>(rotated[d]);  // exact
    for (int64_t d = 0; d < s.value_dim; ++d) v_to[d] = v_from[d * value.stride(3)];
  }

  // All that no row writes itself: of chunks, which are read by many tiles, and padding. Neighbours that go to one block are one
  // tile: there a line of keys holds many positions, and threads that each had some of them would wait for each other.
  void write_others() const {
    std::vector<int64_t> tokens, firsts;
    auto block_of = [this](int64_t token) { return call.slots[token] / call.shape.block_size; };
    auto add = [&](int64_t token) {
      if (tokens.empty() || block_of(token) != block_of(tokens.back())) firsts.push_back(tokens.size());
      tokens.push_back(token);
    };
    int64_t next = 0;
    for (int64_t r = 0; r < call.num_rows; ++r) {
      if (!call.writes_itself(r)) continue;
      for (; next < call.starts[r]; ++next) add(next);
      next = call.starts[r + 1];
    }
    for (; next < call.num_tokens; ++next) add(next);
    const int64_t num_tokens = tokens.size(), heads = call.shape.num_kv_heads, blocks = firsts.size();
    firsts.push_back(num_tokens);
    run_tiles(num_tokens >= 4, blocks * heads, [&](int64_t tile) {
      for (int64_t i = firsts[tile / heads]; i < firsts[tile / heads + 1]; ++i) write(tokens[i], tile % heads);
    });
  }
};

inline int64_t spans_of(const Call& call, const Tile& tile) {
  const int64_t chunk = call.starts[tile.row + 1] - call.starts[tile.row];
  const int64_t last = call.lengths[tile.row] - chunk + (tile.token - call.starts[tile.row]) + tile.num_tokens;
  return (last + kSpan - 1) / kSpan;
}

// Decode rows are split by span, so that few long rows still fill all threads; a prefill chunk has tiles enough.
inline std::vector<Tile> tiles_of(const Call& call) {
  const AttentionShape& s = call.shape;
  const int32_t step = static_cast<int32_t>(std::max<int64_t>(1, kTileRows / s.group()));
  std::vector<Tile> tiles;
  for (int32_t r = 0; r < call.num_rows; ++r) {
    const int32_t first = call.starts[r], end = call.starts[r + 1];
    for (int32_t t = first; t < end; t += step)
      for (int32_t h = 0; h < s.num_kv_heads; ++h) {
        Tile tile{r, h, t, std::min(step, end - t), -1};
        const int64_t spans = end - first == 1 ? spans_of(call, tile) : 1;
        for (int32_t i = 0; i < spans; ++i) {
          tile.span = spans > 1 ? i : -1;
          tiles.push_back(tile);
        }
      }
  }
  return tiles;
}

// Gathers a tile's queries as [token, head of the group] rows, turned, with their positions.
template <typename T>
Queries<Lane<T>> queries_of(const Call& call, const Tile& tile, const at::Tensor& query, Scratch& scratch) {
  const AttentionShape& s = call.shape;
  const T* q = reinterpret_cast<const T*>(query.const_data_ptr());
  const int64_t chunk = call.starts[tile.row + 1] - call.starts[tile.row];
  Lane<T>* const to = reinterpret_cast<Lane<T>*>(scratch.q.data());
  int64_t rows = 0, lanes = lanes_of<Lane<T>>(s.head_dim);
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t)
    for (int64_t g = 0; g < s.group(); ++g, ++rows) {
      const T* from = q + (tile.kv_head * s.group() + g) * query.stride(1) + t * query.stride(2);
      float* row = scratch.row.data();
      head_to_floats(from, query.stride(3), row, s.head_dim);
      call.rotate_token<T>(t, row);
      put_lanes(row, to + rows * lanes, s.head_dim);  // exact
      scratch.positions[rows] = call.lengths[tile.row] - chunk + (t - call.starts[tile.row]);
    }
  return {to, scratch.positions.data(), rows};
}

// Divides by the softmax sum (a sink adds to it, as in gpt-oss) and stores [1, T, H, D_v].
template <typename T>
void store(const Call& call, const Tile& tile, Partial state, const float* sinks, T* out) {
  const AttentionShape& s = call.shape;
  int64_t row = 0;
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t)
    for (int64_t g = 0; g < s.group(); ++g, ++row) {
      const int64_t head = tile.kv_head * s.group() + g;
      float* from = state.out + row * s.value_stride();
      const float total = state.sum[row] + (sinks ? std::exp(sinks[head] - state.max[row]) : 0.0f);
      const float inverse = 1.0f / total;
      for (int64_t d = 0; d < s.value_dim; ++d) from[d] *= inverse;
      convert(from, out + (t * s.num_heads + head) * s.value_dim, s.value_dim);
    }
}

// The partial results of decode rows that were split by span: [tile][max, sum, out] in tile order.
struct Partials {
  std::vector<float> memory;
  int64_t rows, stride;
  Partials(int64_t tiles, const AttentionShape& s) : rows(s.group()), stride(s.value_stride()) {
    memory.resize(tiles * rows * (stride + 2));
  }
  Partial of(int64_t tile) {
    float* base = memory.data() + tile * rows * (stride + 2);
    return {base, base + rows, base + 2 * rows};
  }
};

template <typename T>
void attend_tiles(const Call& call, const at::Tensor& query, const NewTokens<T>& tokens, const float* sinks, T* out) {
  const AttentionShape& s = call.shape;
  const std::vector<Tile> tiles = tiles_of(call);
  const bool split = std::any_of(tiles.begin(), tiles.end(), [](const Tile& t) { return t.span >= 0; });
  Partials partials(split ? tiles.size() : 0, s);
  ThreadPool::instance().run(tiles.size(), [&](int64_t i) {
    static thread_local Scratch scratch;
    scratch.fit(s);
    const Tile& tile = tiles[i];
    const bool is_last = tile.span < 0 || tile.span == spans_of(call, tile) - 1;
    if (is_last && call.writes_itself(tile.row)) tokens.write(tile.token, tile.kv_head);
    const Queries<Lane<T>> queries = queries_of<T>(call, tile, query, scratch);
    const Blocks<T> blocks{tokens.key_pool, tokens.value_pool, call.tables + tile.row * s.max_blocks, tile.kv_head};
    auto attend = [&](int64_t span, Partial into) {
      attend_span(queries, blocks, span * kSpan, (span + 1) * kSpan, into, scratch, s);
    };
    if (tile.span >= 0) return attend(tile.span, partials.of(i));
    Partial total = scratch.partial(0, s), next = scratch.partial(1, s);
    attend(0, total);
    for (int64_t span = 1; span < spans_of(call, tile); ++span) {
      attend(span, next);
      merge(total, next, queries.rows, s.value_stride());
    }
    store<T>(call, tile, total, sinks, out);
  }, call.has_chunk());
  if (!split) return;
  for (size_t i = 0; i < tiles.size(); ++i) {
    if (tiles[i].span != 0) continue;
    Partial total = partials.of(i);
    for (size_t j = i + 1; j < tiles.size() && tiles[j].span > 0; ++j)
      merge(total, partials.of(j), s.group(), s.value_stride());
    store<T>(call, tiles[i], total, sinks, out);
  }
}

// Every index that the kernel will follow, checked before anything is written.
inline void check(const Call& call, int64_t num_blocks) {
  const AttentionShape& s = call.shape;
  for (int64_t t = 0; t < call.num_tokens; ++t)
    TORCH_CHECK(call.slots[t] >= 0 && call.slots[t] < num_blocks * s.block_size, "paged_attention: slot ",
                call.slots[t], " of token ", t, " is outside the pool of ", num_blocks, " blocks of ", s.block_size);
  for (int64_t r = 0; r < call.num_rows; ++r) {
    const int64_t chunk = call.starts[r + 1] - call.starts[r];
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

inline at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Rotary& rotary,
                            at::Tensor key_pool, at::Tensor value_pool, const at::Tensor& slot_mapping,
                            const at::Tensor& cu_seqlens, const at::Tensor& block_tables, const at::Tensor& seq_lens,
                            const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window, double softcap) {
  TORCH_CHECK(key_pool.is_contiguous() && value_pool.is_contiguous(), "paged_attention: the pool must be contiguous");
  TORCH_CHECK(query.scalar_type() == key_pool.scalar_type() && key.scalar_type() == key_pool.scalar_type() &&
                  value.scalar_type() == value_pool.scalar_type(),
              "paged_attention: queries, keys, values and pool must share one dtype; got ", query.scalar_type(), ", ",
              key.scalar_type(), ", ", value.scalar_type(), ", ", key_pool.scalar_type());
  Call call;
  call.rotary = rotary;
  call.shape = {query.size(1),       key.size(1),          query.size(3),
                value.size(3),       key_pool.size(3),     block_tables.size(1),
                static_cast<float>(scale), static_cast<float>(softcap), sliding_window};
  TORCH_CHECK(call.shape.block_size % 16 == 0, "paged_attention: block size ", call.shape.block_size,
              "; allowed: multiples of 16");
  TORCH_CHECK(call.shape.group() <= kTileRows, "paged_attention: ", call.shape.group(),
              " query heads share a KV head; allowed: up to ", kTileRows);
  at::Tensor starts = cu_seqlens.contiguous(), tables = block_tables.contiguous(), lengths = seq_lens.contiguous(),
             slots = slot_mapping.contiguous();
  call.starts = starts.const_data_ptr<int32_t>();
  call.tables = tables.const_data_ptr<int32_t>();
  call.lengths = lengths.const_data_ptr<int32_t>();
  call.slots = slots.const_data_ptr<int64_t>();
  call.num_rows = lengths.numel();
  call.num_tokens = slots.numel();
  check(call, key_pool.size(0));
  at::Tensor sink_values = sinks ? sinks->to(at::kFloat).contiguous() : at::Tensor();
  const float* sink_data = sinks ? sink_values.const_data_ptr<float>() : nullptr;
  at::Tensor out = at::empty({1, query.size(2), query.size(1), value.size(3)}, query.options());
  // Zeros: tokens outside of all rows belong to nobody, and what follows must stay finite.
  const int64_t first = call.num_rows ? call.starts[0] : 0, end = call.num_rows ? call.starts[call.num_rows] : 0;
  if (first > 0) out.narrow(1, 0, first).zero_();
  if (end < out.size(1)) out.narrow(1, end, out.size(1) - end).zero_();
  MULTIBATCH_DISPATCH(query.scalar_type(), "paged_attention", {
    const NewTokens<T> tokens{call, key, value, reinterpret_cast<T*>(key_pool.data_ptr()),
                              reinterpret_cast<T*>(value_pool.data_ptr())};
    tokens.write_others();
    attend_tiles<T>(call, query, tokens, sink_data, reinterpret_cast<T*>(out.data_ptr()));
  });
  return out;
}

inline at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  at::Tensor key_pool, at::Tensor value_pool, const at::Tensor& slot_mapping,
                                  const at::Tensor& cu_seqlens, const at::Tensor& block_tables, const at::Tensor& seq_lens,
                                  const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window,
                                  double softcap) {
  return attention(query, key, value, {}, key_pool, value_pool, slot_mapping, cu_seqlens, block_tables, seq_lens, sinks,
                   scale, sliding_window, softcap);
}

inline at::Tensor rotary_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const at::Tensor& cos, const at::Tensor& sin, at::Tensor key_pool, at::Tensor value_pool,
                                   const at::Tensor& slot_mapping, const at::Tensor& cu_seqlens,
                                   const at::Tensor& block_tables, const at::Tensor& seq_lens,
                                   const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window,
                                   double softcap) {
  const int64_t dims = cos.size(-1), most = query.size(3);
  TORCH_CHECK(cos.sizes() == sin.sizes() && cos.numel() == query.size(2) * dims && dims % 2 == 0 && dims <= most,
              "rotary_attention: cosines ", cos.sizes(), " and sines ", sin.sizes(), "; allowed: [1, 1, ", query.size(2),
              ", an even number up to ", most, "]");
  TORCH_CHECK(cos.scalar_type() == query.scalar_type() && sin.scalar_type() == query.scalar_type(),
              "rotary_attention: cosines and sines must be ", query.scalar_type(), "; got ", cos.scalar_type(), ", ",
              sin.scalar_type());
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  return attention(query, key, value, {c.const_data_ptr(), s.const_data_ptr(), dims}, key_pool, value_pool,
                   slot_mapping, cu_seqlens, block_tables, seq_lens, sinks, scale, sliding_window, softcap);
}

}  // namespace multibatch
