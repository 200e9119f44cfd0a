// Attention as operators: new keys and values, tiles and threads. attention_call.h has what a call asks for, paged_attention.h the
// arithmetic.
#pragma once

#include "attention_call.h"
#include "call.h"

namespace multibatch {

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

  // Where a row's blocks lie in the pool.
  Blocks<T> blocks(int64_t row, int64_t head) const {
    return {key_pool, value_pool, call.tables + row * call.shape.max_blocks, head};
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

// Keys and values of rows that many tiles read, laid out once for all of these, span by span; in memory of the calling thread.
template <typename T>
class SharedSpans {
 public:
  explicit SharedSpans(const Call& call) : num_heads_(call.shape.num_kv_heads) {
    const AttentionShape& s = call.shape;
    const int64_t most = kMostBytes / sizeof(Lane<T>) / laid_out_lanes<Lane<T>>(s);
    for (int64_t r = 0; r < call.num_rows; ++r) {
      if (call.chunk(r) * s.group <= kFewTiles * kTileRows) continue;
      const int64_t first = s.first_seen(call.position(r, call.starts[r])) / kSpan, end = (call.lengths[r] + kSpan - 1) / kSpan;
      const int64_t place = pieces_.size();
      if (place + (end - first) * num_heads_ > most) continue;
      rows_.resize(call.num_rows);
      rows_[r] = {place, first};
      for (int64_t span = first; span < end; ++span)
        for (int64_t head = 0; head < num_heads_; ++head) pieces_.push_back({r, head, span, {}});
    }
  }

  void lay_out(const Call& call, const NewTokens<T>& tokens) {
    const AttentionShape& s = call.shape;
    const int64_t lanes = laid_out_lanes<Lane<T>>(s);
    auto* const memory = static_cast<Lane<T>*>(scratch<3>(pieces_.size() * lanes * sizeof(Lane<T>)));
    run_tiles(true, pieces_.size(), [&](int64_t i) {
      Piece& piece = pieces_[i];
      const int64_t begin = piece.span * kSpan / s.block_size * s.block_size;
      const int64_t end = std::min<int64_t>((piece.span + 1) * kSpan, call.lengths[piece.row]);
      piece.laid_out = lay_out_span(tokens.blocks(piece.row, piece.kv_head), begin, end, memory + i * lanes, s);
    });
  }

  // Null: a tile of this row lays the span out for itself.
  const LaidOut<Lane<T>>* of(const Tile& tile, int64_t span) const {
    if (rows_.empty() || rows_[tile.row].place < 0) return nullptr;
    const Row& row = rows_[tile.row];
    return &pieces_[row.place + (span - row.first_span) * num_heads_ + tile.kv_head].laid_out;
  }

 private:
  static constexpr int64_t kFewTiles = 2;          // that do not share
  static constexpr int64_t kMostBytes = 64 << 20;  // of a call
  struct Row {
    int64_t place = -1, first_span = 0;  // of its first piece
  };
  struct Piece {
    int64_t row, kv_head, span;
    LaidOut<Lane<T>> laid_out;
  };
  int64_t num_heads_;
  std::vector<Row> rows_;  // of the call, or none
  std::vector<Piece> pieces_;
};

// Gathers a tile's queries as [token, head of the group] rows, turned, with their positions.
template <typename T>
Queries<Lane<T>> queries_of(const Call& call, const Tile& tile, const at::Tensor& query, Scratch& scratch) {
  const AttentionShape& s = call.shape;
  const T* q = reinterpret_cast<const T*>(query.const_data_ptr());
  Lane<T>* const to = reinterpret_cast<Lane<T>*>(scratch.q.data());
  int64_t rows = 0, lanes = lanes_of<Lane<T>>(s.head_dim);
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t)
    for (int64_t g = 0; g < s.group; ++g, ++rows) {
      const T* from = q + (tile.kv_head * s.group + g) * query.stride(1) + t * query.stride(2);
      float* row = scratch.row.data();
      head_to_floats(from, query.stride(3), row, s.head_dim);
      call.rotate_token<T>(t, row);
      put_lanes(row, to + rows * lanes, s.head_dim);  // exact
      scratch.positions[rows] = call.position(tile.row, t);
    }
  return {to, scratch.positions.data(), rows};
}

// Divides by the softmax sum (a sink adds to it, as in gpt-oss) and stores [1, T, H, D_v].
template <typename T>
void store(const Call& call, const Tile& tile, Partial state, const float* sinks, T* out) {
  const AttentionShape& s = call.shape;
  int64_t row = 0;
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t)
    for (int64_t g = 0; g < s.group; ++g, ++row) {
      const int64_t head = tile.kv_head * s.group + g;
      float* from = state.out + row * s.value_stride;
      const float total = state.sum[row] + (sinks ? std::exp(sinks[head] - state.max[row] / kUnitsInNat<T>) : 0.0f);
      const float inverse = 1.0f / total;
      for (int64_t d = 0; d < s.value_dim; ++d) from[d] *= inverse;
      convert(from, out + (t * s.num_heads + head) * s.value_dim, s.value_dim);
    }
}

// The partial results of decode rows that were split by span: [tile][max, sum, out] in tile order.
struct Partials {
  std::vector<float> memory;
  int64_t rows, stride;
  Partials(int64_t tiles, const AttentionShape& s) : rows(s.group), stride(s.value_stride) {
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
  const bool split = std::any_of(tiles.begin(), tiles.end(), [](const Tile& t) { return t.is_part; });
  Partials partials(split ? tiles.size() : 0, s);
  SharedSpans<T> shared(call);
  shared.lay_out(call, tokens);
  ThreadPool::instance().run(tiles.size(), [&](int64_t i) {
    static thread_local Scratch scratch;
    scratch.fit(s);
    const Tile& tile = tiles[i];
    const bool is_last = tile.end_span * kSpan >= call.lengths[tile.row];
    if (is_last && call.writes_itself(tile.row)) tokens.write(tile.token, tile.kv_head);
    const Queries<Lane<T>> queries = queries_of<T>(call, tile, query, scratch);
    const Blocks<T> blocks = tokens.blocks(tile.row, tile.kv_head);
    auto attend = [&](int64_t span, Partial into) { attend_span(queries, blocks, shared.of(tile, span), span, into, scratch, s); };
    if (tile.is_part) return attend(tile.first_span, partials.of(i));
    Partial total = scratch.partial(0, s), next = scratch.partial(1, s);
    attend(tile.first_span, total);
    for (int64_t span = tile.first_span + 1; span < tile.end_span; ++span) {
      attend(span, next);
      merge<T>(total, next, queries.rows, s.value_stride);
    }
    store<T>(call, tile, total, sinks, out);
  }, call.has_chunk());
  for (size_t i = 0, end = 0; split && i < tiles.size(); i = end) {
    for (end = i + 1; end < tiles.size() && tiles[end].continues(tiles[i]); ++end)
      merge<T>(partials.of(i), partials.of(end), s.group, s.value_stride);
    if (tiles[i].is_part) store<T>(call, tiles[i], partials.of(i), sinks, out);
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
  const int64_t block_size = key_pool.size(3);
  TORCH_CHECK(block_size > 0 && block_size % 16 == 0, "paged_attention: block size ", block_size, "; allowed: multiples of 16");
  TORCH_CHECK(query.size(1) <= kTileRows * key.size(1), "paged_attention: ", query.size(1), " query heads share ", key.size(1),
              " KV heads; allowed: up to ", kTileRows, " each");
  const at::Tensor starts = cu_seqlens.contiguous(), tables = block_tables.contiguous(), lengths = seq_lens.contiguous(),
                   slots = slot_mapping.contiguous();
  const Call call{{query.size(1), key.size(1), query.size(3), value.size(3), block_size, block_tables.size(1),
                   static_cast<float>(scale), static_cast<float>(softcap), sliding_window},
                  rotary,
                  starts.const_data_ptr<int32_t>(),
                  lengths.const_data_ptr<int32_t>(),
                  tables.const_data_ptr<int32_t>(),
                  slots.const_data_ptr<int64_t>(),
                  lengths.numel(),
                  slots.numel()};
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
