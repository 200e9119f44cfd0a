// The operators as C functions, which AOTInductor's programs call past the dispatcher: no boxes around the arguments, some
// 4 us less each (aot_inductor.custom_ops_to_c_shims). Names and argument types follow from the schemas in multibatch/ops.py
// by the rules in multibatch_compile/shims.py, which declares them to the programs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/utils.h>

#define MULTIBATCH_SHIM(NAME, RESULT, ...)                                                                    \
  extern "C" AOTITorchError aoti_torch_cpu_##NAME(__VA_ARGS__, AtenTensorHandle* result) {                    \
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ *result = torch::aot_inductor::new_tensor_handle(RESULT); }) \
  }

namespace multibatch {

inline const at::Tensor& tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

inline std::optional<at::Tensor> tensor(AtenTensorHandle* handle) {
  return handle ? std::optional<at::Tensor>(tensor(*handle)) : std::nullopt;
}

}  // namespace multibatch

using multibatch::tensor;

MULTIBATCH_SHIM(packed_linear,
                multibatch::packed_linear(tensor(x), tensor(weight), tensor(bias), tensor(scales), tensor(sums),
                                          out_features),
                AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* scales,
                AtenTensorHandle* sums, int64_t out_features)

MULTIBATCH_SHIM(gated_linear,
                multibatch::gated_linear(tensor(gate_up), tensor(weight), tensor(bias), tensor(scales), tensor(sums),
                                         out_features, activation),
                AtenTensorHandle gate_up, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* scales,
                AtenTensorHandle* sums, int64_t out_features, const char* activation)

MULTIBATCH_SHIM(normed_linear,
                multibatch::normed_linear(tensor(x), tensor(norm), epsilon, offset, round_first, tensor(weight),
                                          tensor(bias), tensor(scales), tensor(sums), out_features),
                AtenTensorHandle x, AtenTensorHandle norm, double epsilon, double offset, int32_t round_first,
                AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* scales, AtenTensorHandle* sums,
                int64_t out_features)

MULTIBATCH_SHIM(residual_linear,
                multibatch::residual_linear(tensor(residual), tensor(x), tensor(weight), tensor(bias), tensor(scales),
                                            tensor(sums), out_features),
                AtenTensorHandle residual, AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                AtenTensorHandle* scales, AtenTensorHandle* sums, int64_t out_features)

MULTIBATCH_SHIM(gated_residual_linear,
                multibatch::gated_residual_linear(tensor(residual), tensor(gate_up), tensor(weight), tensor(bias),
                                                  tensor(scales), tensor(sums), out_features, activation),
                AtenTensorHandle residual, AtenTensorHandle gate_up, AtenTensorHandle weight, AtenTensorHandle* bias,
                AtenTensorHandle* scales, AtenTensorHandle* sums, int64_t out_features, const char* activation)

MULTIBATCH_SHIM(gated_mlp,
                multibatch::gated_mlp(tensor(x), tensor(residual), tensor(norm), epsilon, offset, round_first,
                                      tensor(gate_up), tensor(gate_up_bias), tensor(gate_up_scales),
                                      tensor(gate_up_sums), tensor(down), tensor(down_bias), tensor(down_scales),
                                      tensor(down_sums), intermediate_size, out_features, activation),
                AtenTensorHandle x, AtenTensorHandle* residual, AtenTensorHandle* norm, double epsilon, double offset,
                int32_t round_first, AtenTensorHandle gate_up, AtenTensorHandle* gate_up_bias,
                AtenTensorHandle* gate_up_scales, AtenTensorHandle* gate_up_sums, AtenTensorHandle down,
                AtenTensorHandle* down_bias, AtenTensorHandle* down_scales, AtenTensorHandle* down_sums,
                int64_t intermediate_size, int64_t out_features, const char* activation)

MULTIBATCH_SHIM(rms_norm, multibatch::rms_norm(tensor(x), tensor(weight), epsilon, offset, round_first),
                AtenTensorHandle x, AtenTensorHandle weight, double epsilon, double offset, int32_t round_first)

MULTIBATCH_SHIM(packed_embedding,
                multibatch::packed_embedding(tensor(ids), tensor(weight), tensor(scales), num_embeddings, embedding_dim,
                                             static_cast<at::ScalarType>(dtype)),
                AtenTensorHandle ids, AtenTensorHandle weight, AtenTensorHandle* scales, int64_t num_embeddings,
                int64_t embedding_dim, int32_t dtype)

MULTIBATCH_SHIM(paged_attention,
                multibatch::paged_attention(tensor(query), tensor(key), tensor(value), tensor(key_pool),
                                            tensor(value_pool), tensor(slot_mapping), tensor(cu_seqlens),
                                            tensor(block_tables), tensor(seq_lens), tensor(sinks), scale,
                                            sliding_window, softcap),
                AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle key_pool,
                AtenTensorHandle value_pool, AtenTensorHandle slot_mapping, AtenTensorHandle cu_seqlens,
                AtenTensorHandle block_tables, AtenTensorHandle seq_lens, AtenTensorHandle* sinks, double scale,
                int64_t sliding_window, double softcap)

MULTIBATCH_SHIM(rotary_attention,
                multibatch::rotary_attention(tensor(query), tensor(key), tensor(value), tensor(cos), tensor(sin),
                                             tensor(key_pool), tensor(value_pool), tensor(slot_mapping),
                                             tensor(cu_seqlens), tensor(block_tables), tensor(seq_lens), tensor(sinks),
                                             scale, sliding_window, softcap),
                AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle cos,
                AtenTensorHandle sin, AtenTensorHandle key_pool, AtenTensorHandle value_pool,
                AtenTensorHandle slot_mapping, AtenTensorHandle cu_seqlens, AtenTensorHandle block_tables,
                AtenTensorHandle seq_lens, AtenTensorHandle* sinks, double scale, int64_t sliding_window,
                double softcap)

#undef MULTIBATCH_SHIM
