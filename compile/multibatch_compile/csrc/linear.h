// Linear layers as operators: checks, the rows that they read, tiles and threads. The products are in packed_linear.h.
#pragma once

#include <unordered_map>

#include "call.h"
#include "packed_linear.h"

namespace multibatch {

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

inline void check_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
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

inline void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.numel() == x.size(-1) && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
              "rms_norm: the weight must be ", x.size(-1), " contiguous elements of ", x.scalar_type());
}

inline at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                         int64_t out_features) {
  return linear(x, packed, bias, scales, sums, out_features, Plain{});
}

inline at::Tensor normed_linear(const at::Tensor& x, const at::Tensor& norm, double epsilon, double offset, bool round_first,
                         const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                         int64_t out_features) {
  check_norm(x, norm);
  const NormOptions options{static_cast<float>(epsilon), static_cast<float>(offset), round_first};
  return linear(x, packed, bias, scales, sums, out_features, Normed{norm, options});
}

inline at::Tensor residual_linear(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& packed,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& sums, int64_t out_features) {
  return linear(x, packed, bias, scales, sums, out_features, Plain{}, residual);
}

inline Gated gate_of(const at::Tensor& gate_up, c10::string_view activation) {
  TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "gated_linear: activation ", activation,
              "; allowed: silu, gelu_tanh");
  TORCH_CHECK(gate_up.size(-1) % 2 == 0, "gated_linear: the last dimension of [gate, up] is ", gate_up.size(-1),
              "; allowed: even");
  return {activation == "silu" ? Activation::silu : Activation::gelu_tanh};
}

inline at::Tensor gated_linear(const at::Tensor& gate_up, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                        int64_t out_features, c10::string_view activation) {
  return linear(gate_up, packed, bias, scales, sums, out_features, gate_of(gate_up, activation));
}

inline at::Tensor gated_residual_linear(const at::Tensor& residual, const at::Tensor& gate_up, const at::Tensor& packed,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                                 const std::optional<at::Tensor>& sums, int64_t out_features,
                                 c10::string_view activation) {
  return linear(gate_up, packed, bias, scales, sums, out_features, gate_of(gate_up, activation), residual);
}

}  // namespace multibatch
