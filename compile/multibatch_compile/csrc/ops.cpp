// The CPU half of the operators that multibatch/ops.py declares: checks, tiles, threads. The arithmetic is in the headers.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "packed_linear.h"
#include "paged_attention.h"
#include "thread_pool.h"

namespace multibatch {
namespace {

// [M, ldx] operands of the micro-kernel, zero beyond K.
template <typename T>
at::Tensor operands(const T* x, int64_t M, int64_t K, int64_t ldx) {
  using O = Operand<T>;
  at::Tensor out = at::empty({M * ldx * static_cast<int64_t>(sizeof(O))}, at::kByte);
  O* to = reinterpret_cast<O*>(out.data_ptr());
  auto convert = [&](int64_t row) {
    O* line = to + row * ldx;
    if constexpr (std::is_same_v<O, float>) {
      floats_from(x + row * K, line, K);
    } else {
      std::memcpy(line, x + row * K, K * sizeof(O));
    }
    std::fill(line + K, line + ldx, O(0.0f));
  };
  if (M >= 32) {
    ThreadPool::instance().run(M, convert);
  } else {
    for (int64_t row = 0; row < M; ++row) convert(row);
  }
  return out;
}

template <typename T>
void linear_of(const at::Tensor& x, const at::Tensor& packed, const T* bias, at::Tensor& y) {
  const int64_t K = x.size(-1), N = y.size(-1), M = K ? x.numel() / K : 0;
  const int64_t ldx = Depth<T>::padded(K);
  const T* x_data = reinterpret_cast<const T*>(x.const_data_ptr());
  const T* w_data = reinterpret_cast<const T*>(packed.const_data_ptr());
  T* y_data = reinterpret_cast<T*>(y.data_ptr());
  at::Tensor held;
  const Operand<T>* rows;
  if constexpr (std::is_same_v<Operand<T>, T>) {
    if (ldx == K) {
      rows = x_data;
    } else {
      held = operands<T>(x_data, M, K, ldx);
      rows = reinterpret_cast<const T*>(held.data_ptr());
    }
  } else {
    held = operands<T>(x_data, M, K, ldx);
    rows = reinterpret_cast<const Operand<T>*>(held.data_ptr());
  }
  ThreadPool::instance().run((N + kPanel - 1) / kPanel, [&](int64_t p) {
    linear_panel<T>(p, w_data, rows, ldx, bias, y_data, M, N, K);
  });
}

#define MULTIBATCH_DISPATCH(TYPE, NAME, ...)                                                      \
  switch (TYPE) {                                                                                 \
    case at::kFloat: { using T = float; __VA_ARGS__; break; }                                     \
    case at::kBFloat16: { using T = c10::BFloat16; __VA_ARGS__; break; }                          \
    case at::kHalf: { using T = c10::Half; __VA_ARGS__; break; }                                  \
    default: TORCH_CHECK(false, NAME, ": dtype ", TYPE, "; allowed: float32, bfloat16, float16"); \
  }

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t out_features) {
  TORCH_CHECK(x.scalar_type() == packed.scalar_type(), "packed_linear: x is ", x.scalar_type(), ", the weight ",
              packed.scalar_type(), "; they must be the same");
  TORCH_CHECK(packed.is_contiguous(), "packed_linear: the weight must be contiguous");
  at::Tensor xc = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  at::Tensor y = at::empty(sizes, x.options());
  MULTIBATCH_DISPATCH(x.scalar_type(), "packed_linear", {
    const int64_t depth = Depth<T>::padded(x.size(-1));
    TORCH_CHECK(packed.numel() == (out_features + kPanel - 1) / kPanel * kPanel * depth, "packed_linear: weight of ",
                packed.numel(), " elements does not hold ", out_features, " x ", x.size(-1));
    at::Tensor b = bias ? bias->contiguous() : at::Tensor();
    linear_of<T>(xc, packed, bias ? reinterpret_cast<const T*>(b.const_data_ptr()) : nullptr, y);
  });
  return y;
}

at::Tensor packed_embedding(const at::Tensor& ids, const at::Tensor& packed, int64_t num_embeddings,
                            int64_t embedding_dim) {
  auto sizes = ids.sizes().vec();
  sizes.push_back(embedding_dim);
  at::Tensor out = at::empty(sizes, packed.options());
  at::Tensor flat = ids.to(at::kLong).contiguous();
  const int64_t* id = flat.const_data_ptr<int64_t>();
  MULTIBATCH_DISPATCH(packed.scalar_type(), "packed_embedding", {
    constexpr int step = Depth<T>::step;
    const int64_t depth = Depth<T>::padded(embedding_dim);
    const T* w = reinterpret_cast<const T*>(packed.const_data_ptr());
    T* to = reinterpret_cast<T*>(out.data_ptr());
    for (int64_t i = 0; i < flat.numel(); ++i) {
      TORCH_CHECK(id[i] >= 0 && id[i] < num_embeddings, "packed_embedding: token id ", id[i],
                  " is outside the vocabulary of ", num_embeddings);
      const T* row = w + id[i] / kPanel * kPanel * depth + id[i] % kPanel * step;
      for (int64_t k = 0; k < embedding_dim; ++k) to[i * embedding_dim + k] = row[k / step * step * kPanel + k % step];
    }
  });
  return out;
}

// The arguments of one paged_attention call in plain C++ terms.
struct Call {
  AttentionShape shape;
  const int32_t* starts;    // [R + 1]: row r's tokens are [starts[r], starts[r + 1])
  const int32_t* lengths;   // [R]: positions of row r in the pool, its new tokens included
  const int32_t* tables;    // [R, max_blocks]
  const int64_t* slots;     // [T]
  int64_t num_rows, num_tokens;
};

// One unit of work: some query tokens of a row for one KV head, over one span or (span < 0) all spans in turn.
struct Tile {
  int32_t row, kv_head, token, num_tokens, span;
};

template <typename T>
void write_pool(const Call& call, const at::Tensor& key, const at::Tensor& value, T* key_pool, T* value_pool) {
  const AttentionShape& s = call.shape;
  const T* k = reinterpret_cast<const T*>(key.const_data_ptr());
  const T* v = reinterpret_cast<const T*>(value.const_data_ptr());
  auto write = [&](int64_t t) {
    const int64_t block = call.slots[t] / s.block_size, offset = call.slots[t] % s.block_size;
    for (int64_t h = 0; h < s.num_kv_heads; ++h) {
      T* k_to = key_pool + (block * s.num_kv_heads + h) * s.head_dim * s.block_size + offset;
      const T* k_from = k + h * key.stride(1) + t * key.stride(2);
      for (int64_t d = 0; d < s.head_dim; ++d) k_to[d * s.block_size] = k_from[d * key.stride(3)];
      T* v_to = value_pool + ((block * s.num_kv_heads + h) * s.block_size + offset) * s.value_dim;
      const T* v_from = v + h * value.stride(1) + t * value.stride(2);
      for (int64_t d = 0; d < s.value_dim; ++d) v_to[d] = v_from[d * value.stride(3)];
    }
  };
  if (call.num_tokens < 32) {
    for (int64_t t = 0; t < call.num_tokens; ++t) write(t);
  } else {
    ThreadPool::instance().run(call.num_tokens, write);
  }
}

int64_t spans_of(const Call& call, const Tile& tile) {
  const int64_t chunk = call.starts[tile.row + 1] - call.starts[tile.row];
  const int64_t last = call.lengths[tile.row] - chunk + (tile.token - call.starts[tile.row]) + tile.num_tokens;
  return (last + kSpan - 1) / kSpan;
}

// Decode rows are split by span, so that few long rows still fill all threads; a prefill chunk has tiles enough.
std::vector<Tile> tiles_of(const Call& call) {
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

// Gathers a tile's queries as [token, head of the group] rows, scaled, with their positions.
template <typename T>
Queries queries_of(const Call& call, const Tile& tile, const at::Tensor& query, Scratch& scratch) {
  const AttentionShape& s = call.shape;
  const T* q = reinterpret_cast<const T*>(query.const_data_ptr());
  const int64_t chunk = call.starts[tile.row + 1] - call.starts[tile.row];
  int64_t rows = 0;
  for (int64_t t = tile.token; t < tile.token + tile.num_tokens; ++t)
    for (int64_t g = 0; g < s.group(); ++g, ++rows) {
      const T* from = q + (tile.kv_head * s.group() + g) * query.stride(1) + t * query.stride(2);
      float* to = scratch.q.data() + rows * s.head_dim;
      for (int64_t d = 0; d < s.head_dim; ++d) to[d] = to_float(from[d * query.stride(3)]) * s.scale;
      scratch.positions[rows] = call.lengths[tile.row] - chunk + (t - call.starts[tile.row]);
    }
  return {scratch.q.data(), scratch.positions.data(), rows};
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
      floats_to(from, out + (t * s.num_heads + head) * s.value_dim, s.value_dim);
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
void attend_tiles(const Call& call, const at::Tensor& query, const T* key_pool, const T* value_pool,
                  const float* sinks, T* out) {
  const AttentionShape& s = call.shape;
  const std::vector<Tile> tiles = tiles_of(call);
  const bool split = std::any_of(tiles.begin(), tiles.end(), [](const Tile& t) { return t.span >= 0; });
  Partials partials(split ? tiles.size() : 0, s);
  ThreadPool::instance().run(tiles.size(), [&](int64_t i) {
    static thread_local Scratch scratch;
    scratch.fit(s);
    const Tile& tile = tiles[i];
    const Queries queries = queries_of<T>(call, tile, query, scratch);
    const int32_t* table = call.tables + tile.row * s.max_blocks;
    auto attend = [&](int64_t span, Partial into) {
      attend_span<T>(queries, key_pool, value_pool, table, tile.kv_head, span * kSpan, (span + 1) * kSpan, into,
                     scratch, s);
    };
    if (tile.span >= 0) return attend(tile.span, partials.of(i));
    Partial total = scratch.partial(0, s), next = scratch.partial(1, s);
    attend(0, total);
    for (int64_t span = 1; span < spans_of(call, tile); ++span) {
      attend(span, next);
      merge(total, next, queries.rows, s.value_stride());
    }
    store<T>(call, tile, total, sinks, out);
  });
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
void check(const Call& call, int64_t num_blocks) {
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

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::Tensor key_pool, at::Tensor value_pool, const at::Tensor& slot_mapping,
                           const at::Tensor& cu_seqlens, const at::Tensor& block_tables, const at::Tensor& seq_lens,
                           const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window,
                           double softcap) {
  TORCH_CHECK(key_pool.is_contiguous() && value_pool.is_contiguous(), "paged_attention: the pool must be contiguous");
  TORCH_CHECK(query.scalar_type() == key_pool.scalar_type() && key.scalar_type() == key_pool.scalar_type() &&
                  value.scalar_type() == value_pool.scalar_type(),
              "paged_attention: queries, keys, values and pool must share one dtype; got ", query.scalar_type(), ", ",
              key.scalar_type(), ", ", value.scalar_type(), ", ", key_pool.scalar_type());
  Call call;
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
  // Zeros: tokens beyond the last row's belong to nobody, and what follows must stay finite.
  at::Tensor out = at::zeros({1, query.size(2), query.size(1), value.size(3)}, query.options());
  MULTIBATCH_DISPATCH(query.scalar_type(), "paged_attention", {
    T* keys = reinterpret_cast<T*>(key_pool.data_ptr());
    T* values = reinterpret_cast<T*>(value_pool.data_ptr());
    write_pool<T>(call, key, value, keys, values);
    attend_tiles<T>(call, query, keys, values, sink_data, reinterpret_cast<T*>(out.data_ptr()));
  });
  return out;
}

int64_t set_num_threads(int64_t num_threads) {
  TORCH_CHECK(num_threads >= 1, "set_num_threads: ", num_threads, "; allowed: 1 or more");
  if (ThreadPool::instance().num_threads() != num_threads) ThreadPool::instance().resize(static_cast<int>(num_threads));
  return ThreadPool::instance().num_threads();
}

}  // namespace
}  // namespace multibatch

TORCH_LIBRARY_IMPL(multibatch, CPU, library) {
  library.impl("packed_linear", multibatch::packed_linear);
  library.impl("packed_embedding", multibatch::packed_embedding);
  library.impl("paged_attention", multibatch::paged_attention);
}

TORCH_LIBRARY_IMPL(multibatch, CompositeExplicitAutograd, library) {
  library.impl("set_num_threads", multibatch::set_num_threads);
}
