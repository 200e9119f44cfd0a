// What the processor says of its caches.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __linux__
#include <unistd.h>
#endif

namespace multibatch {

// Bytes of a core's second-level cache; 128 KiB where that is not known.
inline int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 128 * 1024);
  return bytes;
#else
  return 128 * 1024;
#endif
}

}  // namespace multibatch
