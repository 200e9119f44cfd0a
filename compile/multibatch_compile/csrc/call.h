// What the operators share: memory that outlives a call, threads, and their dtypes.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "numeric.h"
#include "thread_pool.h"

#define MULTIBATCH_DISPATCH(TYPE, NAME, ...)                                                      \
  switch (TYPE) {                                                                                 \
    case at::kFloat: { using T = float; __VA_ARGS__; break; }                                     \
    case at::kBFloat16: { using T = c10::BFloat16; __VA_ARGS__; break; }                          \
    case at::kHalf: { using T = c10::Half; __VA_ARGS__; break; }                                  \
    default: TORCH_CHECK(false, NAME, ": dtype ", TYPE, "; allowed: float32, bfloat16, float16"); \
  }

namespace multibatch {

template <typename T>
const T* data_of(const std::optional<at::Tensor>& t) {
  return t ? reinterpret_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Memory of the calling thread that outlives the call, so that a step allocates none.
template <int Which>
void* scratch(size_t bytes) {
  static thread_local std::vector<f32x16> memory;
  if (memory.size() * sizeof(f32x16) < bytes) memory.resize((bytes + sizeof(f32x16) - 1) / sizeof(f32x16));
  return memory.data();
}

// Memory for one row of the working thread.
template <typename T>
T* row_buffer(int64_t n) {
  static thread_local std::vector<f32x16> memory;
  const size_t vectors = (n * sizeof(T) + sizeof(f32x16) - 1) / sizeof(f32x16);
  if (memory.size() < vectors) memory.resize(vectors);
  return reinterpret_cast<T*>(memory.data());
}

// Runs on all threads what is worth it: about the work of one wake-up and more.
inline void run_tiles(bool worth_it, int64_t tiles, const std::function<void(int64_t)>& fn) {
  if (worth_it) {
    ThreadPool::instance().run(tiles, fn);
  } else {
    for (int64_t i = 0; i < tiles; ++i) fn(i);
  }
}

}  // namespace multibatch
