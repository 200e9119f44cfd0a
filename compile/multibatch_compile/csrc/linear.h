// Linear layers as operators: checks, the rows that they read, tiles and threads. The products are in packed_linear.h.
#pragma once

#include <unordered_map>

#include "call.h"
#include "packed_linear.h"

namespace multibatch {

// Memory for x as the micro-kernel reads it.
template <int Which, typename W, typename T>
typename Format<W>::Lane* lanes_for(const LinearCall<W, T>& call) {
  using Lane = typename Format<W>::Lane;
  const int64_t chunks = (call.units * Format<W>::lanes + kChunk - 1) / kChunk;
  return static_cast<Lane*>(scratch<Which>(chunks * call.M * kChunkStride * sizeof(Lane)));
}

// Lays x [M, K] out for the micro-kernel, quantised where the weight is, and puts it into the call. `row_of(i)` gives
// row i, in memory that the thread may use again for its next row.
template <typename W, typename T, typename RowOf>
void prepare(LinearCall<W, T>& call, int64_t K, const RowOf& row_of) {
  using Lane = typename Format<W>::Lane;
  const int64_t lanes = call.units * Format<W>::lanes, distance = call.M * kChunkStride;
  Lane* out = lanes_for<0>(call);
  float* scales = static_cast<float*>(scratch<1>(call.M * sizeof(float)));
  run_tiles(call.M * K >= 4096, call.M, [&](int64_t row) {
    const T* x = row_of(row);
    if constexpr (kQuantized<W>) {
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

// The products of a call whose x is laid out.
template <typename W, typename T>
void multiply(const LinearCall<W, T>& call) {
  const int64_t row_bytes = call.units * Format<W>::lanes * sizeof(typename Format<W>::Lane);
  const Tiling tiling(call.M, call.N, call.gated.rows != nullptr, row_bytes);
  auto fn = [&](int64_t tile) { linear_tile(call, tiling, tile); };
  ThreadPool& pool = ThreadPool::instance();
  if (tiling.tiles_are_long()) {
    pool.expect({});
  } else {
    const int64_t bytes = tiling.panels_per_tile * call.units * kUnitBytes<W>;
    const char* const packed = reinterpret_cast<const char*>(call.packed);
    pool.expect(Succession::of_this_thread().after({packed, tiling.count(), bytes}));
  }
  pool.run(tiling.count(), fn, tiling.tiles_are_long());
}

// One packed weight with what belongs to it.
struct Weight {
  const at::Tensor& packed;
  const std::optional<at::Tensor>&bias, &scales, &sums;
  int64_t out_features;

  bool is_int8() const { return packed.scalar_type() == at::kChar; }
  bool is_int4() const { return packed.scalar_type() == at::kByte; }

  void check(at::ScalarType x, int64_t K, int64_t panel_bytes) const {
    const int64_t N = out_features;
    TORCH_CHECK(is_int8() || is_int4() || x == packed.scalar_type(), "packed_linear: x is ", x, ", the weight ",
                packed.scalar_type(), "; they must be the same, or the weight int8 or, for int4, uint8");
    TORCH_CHECK(packed.is_contiguous(), "packed_linear: the weight must be contiguous");
    TORCH_CHECK(static_cast<int64_t>(packed.nbytes()) == (N + kPanel - 1) / kPanel * panel_bytes, "packed_linear: weight of ",
                packed.nbytes(), " bytes does not hold ", N, " x ", K);
    TORCH_CHECK(!bias || (bias->scalar_type() == x && bias->numel() == N && bias->is_contiguous()),
                "packed_linear: the bias must be ", N, " contiguous elements of ", x);
    const at::ScalarType sum = is_int8() ? at::kInt : at::kFloat;
    TORCH_CHECK((!is_int8() && !is_int4()) || (sums && sums->scalar_type() == sum && sums->numel() == N && sums->is_contiguous()),
                "packed_linear: a weight of ", packed.scalar_type(), " needs ", N, " sums of ", sum);
    TORCH_CHECK(!is_int8() || (scales && scales->scalar_type() == at::kFloat && scales->numel() == N && scales->is_contiguous()),
                "packed_linear: an int8 weight needs ", N, " float32 scales");
  }
};

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
    gate_row(gate, gate + K, out, K, g.activation);
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

// A call of this weight on M rows of K numbers, x not laid out yet.
template <typename W, typename T>
LinearCall<W, T> call_of(const Weight& w, int64_t M, int64_t K) {
  w.check(c10::CppTypeToScalarType<T>::value, K, units_of<W>(K) * kUnitBytes<W>);
  LinearCall<W, T> call{};
  call.packed = reinterpret_cast<const W*>(w.packed.const_data_ptr());
  call.bias = data_of<T>(w.bias), call.scales = data_of<float>(w.scales), call.sums = data_of<typename LinearCall<W, T>::Sum>(w.sums);
  call.M = M, call.N = w.out_features, call.units = units_of<W>(K);
  return call;
}

// Calls run.template operator()<W, T>() with the types of this weight and of x.
template <typename Run>
void with_types(const at::Tensor& x, const Weight& w, const Run& run) {
  MULTIBATCH_DISPATCH(x.scalar_type(), "packed_linear", {
    if (w.is_int8()) {
      run.template operator()<int8_t, T>();
    } else if (w.is_int4()) {
      run.template operator()<Nibbles, T>();
    } else {
      run.template operator()<T, T>();
    }
  });
}

// What a linear layer gives, and what is added to it.
struct Result {
  at::Tensor y;
  std::optional<at::Tensor> residual;
  Result(const at::Tensor& x, int64_t out_features, const std::optional<at::Tensor>& added) {
    auto sizes = x.sizes().vec();
    sizes.back() = out_features;
    y = at::empty(sizes, x.options());
    TORCH_CHECK(!added || (added->sizes() == y.sizes() && added->scalar_type() == y.scalar_type()),
                "residual_linear: the residual must be ", y.scalar_type(), y.sizes());
    if (added) residual = added->contiguous();
  }
  template <typename W, typename T>
  void put_into(LinearCall<W, T>& call) const {
    call.y = reinterpret_cast<T*>(y.data_ptr());
    call.residual = data_of<T>(residual);
  }
};

template <typename Source>
at::Tensor linear(const at::Tensor& x, const Weight& weight, const Source& source,
                  const std::optional<at::Tensor>& residual = std::nullopt) {
  const at::Tensor xc = x.contiguous();
  const Result result(x, weight.out_features, residual);
  const int64_t K = x.size(-1) / (std::is_same_v<Source, Gated> ? 2 : 1), M = K ? x.numel() / x.size(-1) : 0;
  with_types(x, weight, [&]<typename W, typename T>() {
    auto call = call_of<W, T>(weight, M, K);
    result.put_into(call);
    if (M == 0) return;
    prepare(call, K, rows_of(source, reinterpret_cast<const T*>(xc.const_data_ptr()), K));
    multiply(call);
  });
  return result.y;
}

// Where the outputs of gate and up go, of so many rows, for `down` to read: laid out for it, or, where it quantises each row by its
// largest number first, as they are.
template <typename W, typename T>
GatedOutputs<W, T> outputs_for(LinearCall<W, T>& down, int64_t K, Activation activation) {
  using E = typename GatedOutputs<W, T>::E;
  constexpr int64_t in_lane = sizeof(typename Format<W>::Lane) / sizeof(E);
  if constexpr (kQuantized<W>)
    return {static_cast<T*>(scratch<2>(down.M * K * sizeof(T))), K, K, 0, activation};
  auto* const lanes = lanes_for<2>(down);
  down.x = lanes;
  return {reinterpret_cast<E*>(lanes), kChunkStride * in_lane, kChunk * in_lane, down.M * kChunkStride * in_lane, activation};
}

// down(activation(gate) * up), gate and up being the halves of one layer's outputs. Of many rows, that is taken as those outputs are
// stored: else they would be written to memory, and read again. Of few, whose time goes by in reading weights, each weight is
// one stream as always.
template <typename Source>
at::Tensor gated_mlp_of(const at::Tensor& x, const Weight& gate_up, const Source& source, const Weight& down,
                        const Gated& gate, const std::optional<at::Tensor>& residual) {
  const int64_t K = x.size(-1), between = gate_up.out_features / 2, M = K ? x.numel() / K : 0;
  if (!Groups(M).are_many() || between % kPanel || gate_up.packed.scalar_type() != down.packed.scalar_type())
    return linear(linear(x, gate_up, source), down, gate, residual);
  const at::Tensor xc = x.contiguous();
  const Result result(x, down.out_features, residual);
  with_types(x, gate_up, [&]<typename W, typename T>() {
    auto first = call_of<W, T>(gate_up, M, K), second = call_of<W, T>(down, M, between);
    first.gated = outputs_for(second, between, gate.activation);
    result.put_into(second);
    prepare(first, K, rows_of(source, reinterpret_cast<const T*>(xc.const_data_ptr()), K));
    multiply(first);
    if constexpr (kQuantized<W>) prepare(second, between, rows_of(Plain{}, first.gated.rows, between));
    multiply(second);
  });
  return result.y;
}

inline void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.numel() == x.size(-1) && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
              "rms_norm: the weight must be ", x.size(-1), " contiguous elements of ", x.scalar_type());
}

inline at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                                int64_t out_features) {
  return linear(x, {packed, bias, scales, sums, out_features}, Plain{});
}

inline at::Tensor normed_linear(const at::Tensor& x, const at::Tensor& norm, double epsilon, double offset, bool round_first,
                                const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                                int64_t out_features) {
  check_norm(x, norm);
  const NormOptions options{static_cast<float>(epsilon), static_cast<float>(offset), round_first};
  return linear(x, {packed, bias, scales, sums, out_features}, Normed{norm, options});
}

inline at::Tensor residual_linear(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& packed,
                                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                                  const std::optional<at::Tensor>& sums, int64_t out_features) {
  return linear(x, {packed, bias, scales, sums, out_features}, Plain{}, residual);
}

inline Gated gate_of(int64_t gate_up, c10::string_view activation) {
  TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", "gated_linear: activation ", activation,
              "; allowed: silu, gelu_tanh");
  TORCH_CHECK(gate_up % 2 == 0, "gated_linear: the last dimension of [gate, up] is ", gate_up, "; allowed: even");
  return {activation == "silu" ? Activation::silu : Activation::gelu_tanh};
}

inline at::Tensor gated_linear(const at::Tensor& gate_up, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& sums,
                               int64_t out_features, c10::string_view activation) {
  return linear(gate_up, {packed, bias, scales, sums, out_features}, gate_of(gate_up.size(-1), activation));
}

inline at::Tensor gated_residual_linear(const at::Tensor& residual, const at::Tensor& gate_up, const at::Tensor& packed,
                                        const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales,
                                        const std::optional<at::Tensor>& sums, int64_t out_features,
                                        c10::string_view activation) {
  return linear(gate_up, {packed, bias, scales, sums, out_features}, gate_of(gate_up.size(-1), activation), residual);
}

inline at::Tensor gated_mlp(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                            const std::optional<at::Tensor>& norm, double epsilon, double offset, bool round_first,
                            const at::Tensor& gate_up, const std::optional<at::Tensor>& gate_up_bias,
                            const std::optional<at::Tensor>& gate_up_scales, const std::optional<at::Tensor>& gate_up_sums,
                            const at::Tensor& down, const std::optional<at::Tensor>& down_bias,
                            const std::optional<at::Tensor>& down_scales, const std::optional<at::Tensor>& down_sums,
                            int64_t intermediate_size, int64_t out_features, c10::string_view activation) {
  const Weight first{gate_up, gate_up_bias, gate_up_scales, gate_up_sums, 2 * intermediate_size};
  const Weight second{down, down_bias, down_scales, down_sums, out_features};
  const Gated gate = gate_of(2 * intermediate_size, activation);
  if (!norm) return gated_mlp_of(x, first, Plain{}, second, gate, residual);
  check_norm(x, *norm);
  const NormOptions options{static_cast<float>(epsilon), static_cast<float>(offset), round_first};
  return gated_mlp_of(x, first, Normed{*norm, options}, second, gate, residual);
}

}  // namespace multibatch
