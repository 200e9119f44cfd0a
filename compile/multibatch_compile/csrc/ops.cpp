// The CPU half of the operators that multibatch/ops.py declares: checks, tiles, threads. The arithmetic is in the headers.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <unordered_map>

#include "packed_linear.h"
#include "paged_attention.h"
#include "peak_rate.h"
#include "sampling.h"
#include "thread_pool.h"

namespace multibatch {
namespace {

// Memory of the calling thread that outlives the call, so that a step allocates none.
template <int Which>
void* scratch(size_t bytes) {
  static thread_local std::vector<f32x16> memory;
  if (memory.size() * sizeof(f32x16) < bytes) memory.resize((bytes + sizeof(f32x16) - 1) / sizeof(f32x16));
  return memory.data();
}

// Runs on all threads what is worth it: about the work of one wake-up and more.
void run_tiles(bool worth_it, int64_t tiles, const std::function<void(int64_t)>& fn) {
  if (worth_it) {
    ThreadPool::instance().run(tiles, fn);
  } else {
    for (int64_t i = 0; i < tiles; ++i) fn(i);
  }
}

// Memory for one row of the working thread.
template <typename T>
T* row_buffer(int64_t n) {
  static thread_local std::vector<f32x16> memory;
  const size_t vectors = (n * sizeof(T) + sizeof(f32x16) - 1) / sizeof(f32x16);
  if (memory.size() < vectors) memory.resize(vectors);
  return reinterpret_cast<T*>(memory.data());
}

// Lays x [M, K] out for the micro-kernel, quantised where the weight is int8, and puts it into the call. `row_of(i)` gives
// row i, in memory that the thread may use again for its next row.
template <typename W, typename T, typename RowOf>
void prepare(LinearCall<W, T>& call, int64_t K, const RowOf& row_of) {
  using Lane = typename Format<W>::Lane;
  const int64_t lanes = call.units * Format<W>::lanes, distance = call.M * kChunkStride;
  Lane* out = static_cast<Lane*>(scratch<0>((lanes + kChunk - 1) / kChunk * distance * sizeof(Lane)));
  float* scales = static_cast<float*>(scratch<1>(call.M * sizeof(float)));
  run_tiles(call.M * K >= 4096, call.M, [&](int64_t row) {
    const T* x = row_of(row);
    if constexpr (std::is_same_v<W, int8_t>) {
      scales[row] = row_scale(x, K);
      // A row of zeros, or one that is not finite: any scale will do.
      quantize_row(x, K, lanes, scales[row] > 0.0f ? scales[row] : 1.0f, out + row * kChunkStride, distance);
    } else {
      pack_row<W>(x, K, lanes, out + row * kChunkStride, distance);
    }
  });
  call.x = out;
  call.x_scales = scales;
}

// The weight that was read after each weight, last time. Layers follow each other in one order, step after step.
class Succession {
 public:
  static Succession& of_this_thread() {
    static thread_local Succession weights;
    return weights;
  }

  // Notes that this weight is read now, and answers which one comes after it.
  Stream after(Stream weight) {
    if (last_) next_[last_] = weight;
    last_ = weight.data;
    return next_[weight.data];
  }

 private:
  const char* last_ = nullptr;
  std::unordered_map<const char*, Stream> next_;
};

template <typename W, typename T, typename RowOf>
void linear_of(LinearCall<W, T>& call, int64_t K, const RowOf& row_of) {
  if (call.M == 0) return;
  prepare(call, K, row_of);
  const Tiling tiling(call.M, call.N);
  auto fn = [&](int64_t tile) { linear_tile(call, tiling, tile); };
  ThreadPool& pool = ThreadPool::instance();
  if (tiling.tiles_are_long()) {
    pool.expect({});
  } else {
    const int64_t bytes = tiling.panels_per_tile * call.units * kPanel * Format<W>::unit * sizeof(W);
    const char* const packed = reinterpret_cast<const char*>(call.packed);
    pool.expect(Succession::of_this_thread().after({packed, tiling.count(), bytes}));
  }
  pool.run(tiling.count(), fn, tiling.tiles_are_long());
}

#define MULTIBATCH_DISPATCH(TYPE, NAME, ...)                                                      \
  switch (TYPE) {                                                                                 \
    case at::kFloat: { using T = float; __VA_ARGS__; break; }                                     \
    case at::kBFloat16: { using T = c10::BFloat16; __VA_ARGS__; break; }                          \
    case at::kHalf: { using T = c10::Half; __VA_ARGS__; break; }                                  \
    default: TORCH_CHECK(false, NAME, ": dtype ", TYPE, "; allowed: float32, bfloat16, float16"); \
  }

template <typename T>
const T* data_of(const std::optional<at::Tensor>& t) {
  return t ? reinterpret_cast<const T*>(t->const_data_ptr()) : nullptr;
}

void check_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums, int64_t K, int64_t N,
                  int64_t depth) {
  const bool is_int8 = packed.scalar_type() == at::kChar;
  TORCH_CHECK(is_int8 || x.scalar_type() == packed.scalar_type(), "packed_linear: x is ", x.scalar_type(),
              ", the weight ", packed.scalar_type(), "; they must be the same, or the weight int8");
  TORCH_CHECK(packed.is_contiguous(), "packed_linear: the weight must be contiguous");
  TORCH_CHECK(packed.numel() == (N + kPanel - 1) / kPanel * kPanel * depth, "packed_linear: weight of ",
              packed.numel(), " elements does not hold ", N, " x ", K);
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->numel() == N && bias->is_contiguous()),
              "packed_linear: the bias must be ", N, " contiguous elements of ", x.scalar_type());
  if (!is_int8) return;
  TORCH_CHECK(scales && scales->scalar_type() == at::kFloat && scales->numel() == N && scales->is_contiguous() && sums &&
                  sums->scalar_type() == at::kInt && sums->numel() == N && sums->is_contiguous(),
              "packed_linear: an int8 weight needs ", N, " float32 scales and ", N, " int32 sums");
}

// What the rows of a linear layer are made of.
struct Plain {};
struct Gated {
  Activation activation;  // activation(gate) * up of each row [gate, up]
};
struct Normed {
  at::Tensor weight;  // of an RMS normalisation
  NormOptions options;
};

template <typename T>
auto rows_of(Plain, const T* x, int64_t K) {
  return [=](int64_t row) { return x + row * K; };
}

template <typename T>
auto rows_of(Gated g, const T* x, int64_t K) {
  return [=](int64_t row) {
    T* out = row_buffer<T>(K);
    const T* gate = x + row * 2 * K;
    for (int64_t k = 0; k < K; k += kStretch)
      gate_stretch(gate + k, gate + K + k, out + k, std::min(kStretch, K - k), g.activation);
    return static_cast<const T*>(out);
  };
}

template <typename T>
auto rows_of(const Normed& n, const T* x, int64_t K) {
  const T* weight = reinterpret_cast<const T*>(n.weight.const_data_ptr());
  return [=, options = n.options](int64_t row) {
    T* out = row_buffer<T>(K);
    rms_norm_row(x + row * K, weight, out, K, options);
    return static_cast<const T*>(out);
  };
}

template <typename Source>
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums, int64_t out_features,
                  const Source& source, const std::optional<at::Tensor>& residual = std::nullopt) {
  at::Tensor xc = x.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  at::Tensor y = at::empty(sizes, x.options());
  TORCH_CHECK(!residual || (residual->sizes() == y.sizes() && residual->scalar_type() == y.scalar_type()),
              "residual_linear: the residual must be ", y.scalar_type(), y.sizes());
  const std::optional<at::Tensor> added = residual ? std::optional(residual->contiguous()) : std::nullopt;
  const int64_t K = x.size(-1) / (std::is_same_v<Source, Gated> ? 2 : 1), M = K ? x.numel() / x.size(-1) : 0;
  auto run = [&]<typename W, typename T>(W*, T*) {
    check_linear(x, packed, bias, scales, sums, K, out_features, units_of<W>(K) * Format<W>::unit);
    LinearCall<W, T> call{reinterpret_cast<const W*>(packed.const_data_ptr()), data_of<T>(bias), data_of<float>(scales),
                          data_of<int32_t>(sums), nullptr, nullptr, data_of<T>(added),
                          reinterpret_cast<T*>(y.data_ptr()), M, out_features, units_of<W>(K)};
    linear_of(call, K, rows_of(source, reinterpret_cast<const T*>(xc.const_data_ptr()), K));
  };
  MULTIBATCH_DISPATCH(x.scalar_type(), "packed_linear", {
    if (packed.scalar_type() == at::kChar) {
      run(static_cast<int8_t*>(nullptr), static_cast<T*>(nullptr));
    } else {
      run(static_cast<T*>(nullptr), static_cast<T*>(nullptr));
    }
  });
  return y;
}

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.numel() == x.size(-1) && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
              "rms_norm: the weight must be ", x.size(-1), " contiguous elements of ", x.scalar_type());
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                         int64_t out_features) {
  return linear(x, packed, bias, scales, sums, out_features, Plain{});
}

at::Tensor normed_linear(const at::Tensor& x, const at::Tensor& norm, double epsilon, double offset, bool round_first,
                         const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                         int64_t out_features) {
  check_norm(x, norm);
  const NormOptions options{static_cast<float>(epsilon), static_cast<float>(offset), round_first};
  return linear(x, packed, bias, scales, sums, out_features, Normed{norm, options});
}

at::Tensor residual_linear(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& packed,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& sums, int64_t out_features) {
  return linear(x, packed, bias, scales, sums, out_features, Plain{}, residual);
}

Gated gate_of(const at::Tensor& gate_up, c10::string_view activation) {
  TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "gated_linear: activation ", activation,
              "; allowed: silu, gelu_tanh");
  TORCH_CHECK(gate_up.size(-1) % 2 == 0, "gated_linear: the last dimension of [gate, up] is ", gate_up.size(-1),
              "; allowed: even");
  return {activation == "silu" ? Activation::silu : Activation::gelu_tanh};
}

at::Tensor gated_linear(const at::Tensor& gate_up, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                        int64_t out_features, c10::string_view activation) {
  return linear(gate_up, packed, bias, scales, sums, out_features, gate_of(gate_up, activation));
}

at::Tensor gated_residual_linear(const at::Tensor& residual, const at::Tensor& gate_up, const at::Tensor& packed,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                                 const std::optional<at::Tensor>& sums, int64_t out_features,
                                 c10::string_view activation) {
  return linear(gate_up, packed, bias, scales, sums, out_features, gate_of(gate_up, activation), residual);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon, double offset, bool round_first) {
  const int64_t n = x.size(-1), rows = n ? x.numel() / n : 0;
  check_norm(x, weight);
  at::Tensor xc = x.contiguous(), y = at::empty(x.sizes(), x.options());
  const NormOptions options{static_cast<float>(epsilon), static_cast<float>(offset), round_first};
  MULTIBATCH_DISPATCH(x.scalar_type(), "rms_norm", {
    const T* from = reinterpret_cast<const T*>(xc.const_data_ptr());
    const T* w = reinterpret_cast<const T*>(weight.const_data_ptr());
    T* to = reinterpret_cast<T*>(y.data_ptr());
    run_tiles(rows * n >= 8192, rows, [&](int64_t r) { rms_norm_row(from + r * n, w, to + r * n, n, options); });
  });
  return y;
}

at::Tensor chunk_maxima(const at::Tensor& scores, int64_t chunk) {
  TORCH_CHECK(scores.dim() == 2 && scores.stride(1) == 1 && chunk >= 1, "chunk_maxima: scores of ", scores.sizes(),
              " in chunks of ", chunk, "; allowed: [n, V] with V contiguous, 1 or more");
  const int64_t n = scores.size(0), V = scores.size(1), chunks = (V + chunk - 1) / chunk, stride = scores.stride(0);
  constexpr int64_t kChunksPerTile = 64;
  const int64_t tiles = (chunks + kChunksPerTile - 1) / kChunksPerTile;
  at::Tensor out = at::empty({n, chunks}, scores.options());
  MULTIBATCH_DISPATCH(scores.scalar_type(), "chunk_maxima", {
    const T* from = reinterpret_cast<const T*>(scores.const_data_ptr());
    T* to = reinterpret_cast<T*>(out.data_ptr());
    ThreadPool::instance().run(n * tiles, [&](int64_t tile) {
      const int64_t row = tile / tiles, first = tile % tiles * kChunksPerTile;
      for (int64_t c = first; c < std::min(first + kChunksPerTile, chunks); ++c)
        to[row * chunks + c] =
            static_cast<T>(maximum(from + row * stride + c * chunk, std::min(chunk, V - c * chunk)));
    });
  });
  return out;
}

at::Tensor first_maxima(const at::Tensor& scores) {
  TORCH_CHECK(scores.dim() == 2 && scores.stride(1) == 1, "first_maxima: scores of ", scores.sizes(),
              "; allowed: [n, V] with V contiguous");
  constexpr int64_t kPerTile = 8192;
  const int64_t n = scores.size(0), V = scores.size(1), tiles = (V + kPerTile - 1) / kPerTile, stride = scores.stride(0);
  at::Tensor out = at::empty({n}, scores.options().dtype(at::kLong));
  std::vector<Highest> parts(tiles * n);  // the columns of a thread are those it computed, and still lie in its cache
  MULTIBATCH_DISPATCH(scores.scalar_type(), "first_maxima", {
    const T* from = reinterpret_cast<const T*>(scores.const_data_ptr());
    ThreadPool::instance().run(n * tiles, [&](int64_t tile) {
      const int64_t first = tile / n * kPerTile;
      parts[tile] = highest(from + tile % n * stride + first, std::min(kPerTile, V - first));
      parts[tile].place += first;
    });
  });
  for (int64_t row = 0; row < n; ++row) {
    Highest all;
    for (int64_t i = row; i < tiles * n; i += n) {
      all.add(parts[i].value, parts[i].place);
      all.nan = all.nan || parts[i].nan;
    }
    out.mutable_data_ptr<int64_t>()[row] = all.nan || !std::isfinite(all.value) ? -1 : all.place;
  }
  return out;
}

template <typename T>
const T* options_of(const at::Tensor& t, int64_t n, at::ScalarType type) {
  TORCH_CHECK(t.scalar_type() == type && t.numel() == n && t.is_contiguous(), "draw_tokens: options of ", t.scalar_type(),
              t.sizes(), "; allowed: ", type, ", one for each of ", n, " rows");
  return t.const_data_ptr<T>();
}

at::Tensor draw_tokens(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                       const at::Tensor& top_p, const at::Tensor& log_min_p, const at::Tensor& random, double scale) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 1 && (logits.size(1) == 1 || logits.stride(1) == 1),
              "draw_tokens: logits of ", logits.sizes(), "; allowed: [n, V] with V contiguous, 1 or more");
  const int64_t n = logits.size(0), V = logits.size(1);
  const float* temperatures = options_of<float>(temperature, n, at::kFloat);
  const int64_t *top_ks = options_of<int64_t>(top_k, n, at::kLong), *randoms = options_of<int64_t>(random, n, at::kLong);
  const double *top_ps = options_of<double>(top_p, n, at::kDouble), *log_min_ps = options_of<double>(log_min_p, n, at::kDouble);
  at::Tensor out = at::empty({n}, logits.options().dtype(at::kLong));
  MULTIBATCH_DISPATCH(logits.scalar_type(), "draw_tokens", {
    run_tiles(n * V >= 4096, n, [&](int64_t i) {
      const DrawOptions options{temperatures[i], top_ks[i], top_ps[i], log_min_ps[i], randoms[i], scale};
      const T* row = reinterpret_cast<const T*>(logits.const_data_ptr()) + i * logits.stride(0);
      out.mutable_data_ptr<int64_t>()[i] = Draw<T>(row, V, options).token();
    });
  });
  return out;
}

// Rows of a packed weight as floats: [ids, embedding_dim] of out's dtype.
template <typename W, typename T>
void embed(const int64_t* ids, int64_t num_ids, const W* packed, const float* scales, int64_t num_embeddings, int64_t K,
           T* out) {
  constexpr int unit = Format<W>::unit;
  const int64_t depth = units_of<W>(K) * unit;
  for (int64_t i = 0; i < num_ids; ++i) {
    const int64_t id = ids[i];
    TORCH_CHECK(id >= 0 && id < num_embeddings, "packed_embedding: token id ", id, " is outside the vocabulary of ",
                num_embeddings);
    const W* row = packed + id / kPanel * kPanel * depth + id % kPanel * unit;
    for (int64_t k = 0; k < K; ++k) {
      const W value = row[k / unit * unit * kPanel + k % unit];
      if constexpr (std::is_same_v<W, T>) {
        out[i * K + k] = value;
      } else {
        out[i * K + k] = static_cast<T>(scales[id] * static_cast<float>(value));
      }
    }
  }
}

at::Tensor packed_embedding(const at::Tensor& ids, const at::Tensor& packed, const std::optional<at::Tensor>& scales,
                            int64_t num_embeddings, int64_t embedding_dim, at::ScalarType dtype) {
  auto sizes = ids.sizes().vec();
  sizes.push_back(embedding_dim);
  at::Tensor out = at::empty(sizes, packed.options().dtype(dtype));
  at::Tensor flat = ids.to(at::kLong).contiguous();
  const int64_t* id = flat.const_data_ptr<int64_t>();
  const bool is_int8 = packed.scalar_type() == at::kChar;
  TORCH_CHECK(is_int8 ? scales.has_value() : packed.scalar_type() == dtype, "packed_embedding: a weight of ",
              packed.scalar_type(), is_int8 ? " needs scales" : " gives no rows of another dtype");
  MULTIBATCH_DISPATCH(dtype, "packed_embedding", {
    T* to = reinterpret_cast<T*>(out.data_ptr());
    if (is_int8) {
      embed(id, flat.numel(), packed.const_data_ptr<int8_t>(), data_of<float>(scales), num_embeddings, embedding_dim, to);
    } else {
      embed(id, flat.numel(), reinterpret_cast<const T*>(packed.const_data_ptr()), nullptr, num_embeddings,
            embedding_dim, to);
    }
  });
  return out;
}

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
  if (stride == 1) return floats_from(from, to, n);
  for (int64_t d = 0; d < n; ++d) to[d] = to_float(from[d * stride]);
}

template <typename T>
void write_pool(const Call& call, const at::Tensor& key, const at::Tensor& value, T* key_pool, T* value_pool) {
  const AttentionShape& s = call.shape;
  const T* k = reinterpret_cast<const T*>(key.const_data_ptr());
  const T* v = reinterpret_cast<const T*>(value.const_data_ptr());
  auto write = [&](int64_t t) {
    const int64_t block = call.slots[t] / s.block_size, offset = call.slots[t] % s.block_size;
    float* rotated = row_buffer<float>(s.head_dim);
    for (int64_t h = 0; h < s.num_kv_heads; ++h) {
      T* k_to = key_pool + (block * s.num_kv_heads + h) * s.head_dim * s.block_size + offset;
      head_to_floats(k + h * key.stride(1) + t * key.stride(2), key.stride(3), rotated, s.head_dim);
      call.rotate_token<T>(t, rotated);
      for (int64_t d = 0; d < s.head_dim; ++d) k_to[d * s.block_size] = static_cast<T>(rotated[d]);  // exact
      T* v_to = value_pool + ((block * s.num_kv_heads + h) * s.block_size + offset) * s.value_dim;
      const T* v_from = v + h * value.stride(1) + t * value.stride(2);
      for (int64_t d = 0; d < s.value_dim; ++d) v_to[d] = v_from[d * value.stride(3)];
    }
  };
  run_tiles(call.num_tokens >= 4, call.num_tokens, write);
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
    const Queries<Lane<T>> queries = queries_of<T>(call, tile, query, scratch);
    const Blocks<T> blocks{key_pool, value_pool, call.tables + tile.row * s.max_blocks, tile.kv_head};
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

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Rotary& rotary,
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
    T* keys = reinterpret_cast<T*>(key_pool.data_ptr());
    T* values = reinterpret_cast<T*>(value_pool.data_ptr());
    write_pool<T>(call, key, value, keys, values);
    attend_tiles<T>(call, query, keys, values, sink_data, reinterpret_cast<T*>(out.data_ptr()));
  });
  return out;
}

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           at::Tensor key_pool, at::Tensor value_pool, const at::Tensor& slot_mapping,
                           const at::Tensor& cu_seqlens, const at::Tensor& block_tables, const at::Tensor& seq_lens,
                           const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window,
                           double softcap) {
  return attention(query, key, value, {}, key_pool, value_pool, slot_mapping, cu_seqlens, block_tables, seq_lens, sinks,
                   scale, sliding_window, softcap);
}

at::Tensor rotary_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cos, const at::Tensor& sin, at::Tensor key_pool, at::Tensor value_pool,
                            const at::Tensor& slot_mapping, const at::Tensor& cu_seqlens,
                            const at::Tensor& block_tables, const at::Tensor& seq_lens,
                            const std::optional<at::Tensor>& sinks, double scale, int64_t sliding_window,
                            double softcap) {
  const int64_t dims = cos.size(-1), most = std::min(query.size(3), kStretch);
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

int64_t set_num_threads(int64_t num_threads) {
  TORCH_CHECK(num_threads >= 1, "set_num_threads: ", num_threads, "; allowed: 1 or more");
  if (ThreadPool::instance().num_threads() != num_threads) ThreadPool::instance().resize(static_cast<int>(num_threads));
  return ThreadPool::instance().num_threads();
}

double peak_rate(at::ScalarType weight, double seconds) {
  ThreadPool& pool = ThreadPool::instance();
  auto run = [&](int64_t tiles, const std::function<void(int64_t)>& fn) { pool.run(tiles, fn, true); };
  if (weight == at::kChar) return peak_rate_of<int8_t>(pool.num_threads(), seconds, run);
  double rate = 0;
  MULTIBATCH_DISPATCH(weight, "peak_rate", { rate = peak_rate_of<T>(pool.num_threads(), seconds, run); });
  return rate;
}

}  // namespace
}  // namespace multibatch

TORCH_LIBRARY_IMPL(multibatch, CPU, library) {
  library.impl("packed_linear", multibatch::packed_linear);
  library.impl("gated_linear", multibatch::gated_linear);
  library.impl("normed_linear", multibatch::normed_linear);
  library.impl("residual_linear", multibatch::residual_linear);
  library.impl("gated_residual_linear", multibatch::gated_residual_linear);
  library.impl("rms_norm", multibatch::rms_norm);
  library.impl("chunk_maxima", multibatch::chunk_maxima);
  library.impl("first_maxima", multibatch::first_maxima);
  library.impl("draw_tokens", multibatch::draw_tokens);
  library.impl("packed_embedding", multibatch::packed_embedding);
  library.impl("paged_attention", multibatch::paged_attention);
  library.impl("rotary_attention", multibatch::rotary_attention);
}

TORCH_LIBRARY_IMPL(multibatch, CompositeExplicitAutograd, library) {
  library.impl("set_num_threads", multibatch::set_num_threads);
  library.impl("peak_rate", multibatch::peak_rate);
}

#include "program.h"
#include "shims.h"
