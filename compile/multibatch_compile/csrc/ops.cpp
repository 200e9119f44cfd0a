// The CPU half of the operators that multibatch/ops.py declares: linear.h, attention.h, and here the smaller ones.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "attention.h"
#include "call.h"
#include "linear.h"
#include "peak_rate.h"
#include "sampling.h"

namespace multibatch {
namespace {

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

// Rows of a packed weight as floats: [ids, embedding_dim] of out's dtype. Each number of some lies in a line of its own, so that
// many rows are work for all threads.
template <typename W, typename T>
void embed(const int64_t* ids, int64_t num_ids, const W* packed, const float* scales, int64_t num_embeddings, int64_t K,
           T* out) {
  constexpr int unit = Format<W>::unit;
  const int64_t depth = units_of<W>(K) * unit;
  for (int64_t i = 0; i < num_ids; ++i)
    TORCH_CHECK(ids[i] >= 0 && ids[i] < num_embeddings, "packed_embedding: token id ", ids[i], " is outside the vocabulary of ",
                num_embeddings);
  run_tiles(num_ids >= 4, num_ids, [=](int64_t i) {
    const int64_t id = ids[i];
    const W* row = packed + id / kPanel * kPanel * depth + id % kPanel * unit;
    for (int64_t k = 0; k < K; ++k) {
      const W value = row[k / unit * unit * kPanel + k % unit];
      if constexpr (std::is_same_v<W, T>) {
        out[i * K + k] = value;
      } else {
        out[i * K + k] = static_cast<T>(scales[id] * static_cast<float>(value));
      }
    }
  });
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

int64_t set_num_threads(int64_t num_threads) {
  TORCH_CHECK(num_threads >= 1, "set_num_threads: ", num_threads, "; allowed: 1 or more");
  if (ThreadPool::instance().num_threads() != num_threads) ThreadPool::instance().resize(static_cast<int>(num_threads));
  return ThreadPool::instance().num_threads();
}

double peak_rate(at::ScalarType weight, double seconds) {
  ThreadPool& pool = ThreadPool::instance();
  auto run = [&](int64_t tiles, const std::function<void(int64_t)>& fn) { pool.run(tiles, fn, true); };
  if (weight == at::kChar) return peak_rate_of<int8_t>(pool.num_threads(), seconds, run);
  if (weight == at::kByte) return peak_rate_of<Nibbles>(pool.num_threads(), seconds, run);
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
  library.impl("gated_mlp", multibatch::gated_mlp);
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
