// Vectors of as many elements as code likes: one of the compiler's (GCC's and Clang's vector extensions, not intrinsics) where a
// register of the target holds them, else a pair of halves. So the same source becomes AVX-512, AVX2 or NEON code by -march
// alone. The compilers take vectors wider than a register too, but GCC 12 keeps those in memory, element by element in places,
// which made a product 6 to 80 times slower.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace multibatch {

#if defined(__AVX512F__)
constexpr size_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kRegisterBytes = 32;
#else
constexpr size_t kRegisterBytes = 16;
#endif

template <typename H>
struct Pair {
  H low, high;
  // One element. For few reads: code that needs all stores them.
  auto operator[](int i) const {
    constexpr int half = sizeof(H) / sizeof(low[0]);
    return i < half ? low[i] : high[i - half];
  }
};

template <typename E, int n>
struct VectorOf {
  using type = Pair<typename VectorOf<E, n / 2>::type>;
};
template <typename E, int n>
  requires(n * sizeof(E) <= kRegisterBytes)
struct VectorOf<E, n> {
  typedef E type __attribute__((vector_size(n * sizeof(E))));
};

// n elements of type E; n: a power of two.
template <typename E, int n>
using Vector = typename VectorOf<E, n>::type;

template <typename V>
using Element = std::remove_cvref_t<decltype(std::declval<const V&>()[0])>;

template <typename V>
constexpr int kElementsOf = sizeof(V) / sizeof(Element<V>);

template <typename V>
using HalfOf = Vector<Element<V>, kElementsOf<V> / 2>;

template <typename V>
constexpr bool kIsPair = false;
template <typename H>
constexpr bool kIsPair<Pair<H>> = true;

#define MULTIBATCH_INLINE __attribute__((always_inline)) inline

template <typename V>
MULTIBATCH_INLINE V load_vector(const void* from) {
  if constexpr (kIsPair<V>) {
    using H = HalfOf<V>;
    return {load_vector<H>(from), load_vector<H>(static_cast<const char*>(from) + sizeof(H))};
  } else {
    V v;
    std::memcpy(&v, from, sizeof(V));  // an unaligned load
    return v;
  }
}

template <typename V>
MULTIBATCH_INLINE void store_vector(void* to, V v) {
  if constexpr (kIsPair<V>) {
    store_vector(to, v.low);
    store_vector(static_cast<char*>(to) + sizeof(v.low), v.high);
  } else {
    std::memcpy(to, &v, sizeof(V));
  }
}

// The two halves of a vector, and a vector of two halves.
template <typename V>
MULTIBATCH_INLINE Pair<HalfOf<V>> halves_of(V v) {
  if constexpr (kIsPair<V>) {
    return v;
  } else {
    Pair<HalfOf<V>> halves;
    std::memcpy(&halves, &v, sizeof(V));
    return halves;
  }
}

template <typename V>
MULTIBATCH_INLINE V join(Pair<HalfOf<V>> halves) {
  if constexpr (kIsPair<V>) {
    return halves;
  } else {
    V v;
    std::memcpy(&v, &halves, sizeof(V));
    return v;
  }
}

// Operators as the compiler's vectors have them: by elements, of two vectors or a vector and a number.
#define MULTIBATCH_BY_HALVES(op)                                                     \
  template <typename H>                                                              \
  MULTIBATCH_INLINE auto operator op(Pair<H> a, Pair<H> b) {                         \
    return Pair{a.low op b.low, a.high op b.high};                                   \
  }                                                                                  \
  template <typename H>                                                              \
  MULTIBATCH_INLINE auto operator op(Pair<H> a, std::type_identity_t<Element<H>> b) { \
    return Pair{a.low op b, a.high op b};                                            \
  }                                                                                  \
  template <typename H>                                                              \
  MULTIBATCH_INLINE auto operator op(std::type_identity_t<Element<H>> a, Pair<H> b) { \
    return Pair{a op b.low, a op b.high};                                            \
  }
MULTIBATCH_BY_HALVES(+)
MULTIBATCH_BY_HALVES(-)
MULTIBATCH_BY_HALVES(*)
MULTIBATCH_BY_HALVES(/)
MULTIBATCH_BY_HALVES(&)
MULTIBATCH_BY_HALVES(|)
MULTIBATCH_BY_HALVES(^)
MULTIBATCH_BY_HALVES(<<)
MULTIBATCH_BY_HALVES(>>)
MULTIBATCH_BY_HALVES(<)
MULTIBATCH_BY_HALVES(<=)
MULTIBATCH_BY_HALVES(>)
MULTIBATCH_BY_HALVES(==)
MULTIBATCH_BY_HALVES(!=)
#undef MULTIBATCH_BY_HALVES

template <typename H>
MULTIBATCH_INLINE Pair<H> operator-(Pair<H> a) {
  return {-a.low, -a.high};
}
template <typename H>
MULTIBATCH_INLINE Pair<H> operator~(Pair<H> a) {
  return {~a.low, ~a.high};
}
template <typename H>
MULTIBATCH_INLINE Pair<H>& operator+=(Pair<H>& a, Pair<H> b) {
  return a = a + b;
}
template <typename H>
MULTIBATCH_INLINE Pair<H>& operator|=(Pair<H>& a, Pair<H> b) {
  return a = a | b;
}

// The elements of `yes` where the mask's are -1, and of `no` where they are 0.
template <typename M, typename V>
MULTIBATCH_INLINE V select(M mask, V yes, V no) {
  if constexpr (kIsPair<V>) {
    return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
  } else {
    return mask ? yes : no;
  }
}

// The same bits as another type.
template <typename To, typename V>
MULTIBATCH_INLINE To bits_as(V v) {
  static_assert(sizeof(To) == sizeof(V));
  if constexpr (kIsPair<V>) {
    return {bits_as<HalfOf<To>>(v.low), bits_as<HalfOf<To>>(v.high)};
  } else {
    return (To)v;
  }
}

// The same numbers as another type, cut off as a cast does.
template <typename To, typename V>
MULTIBATCH_INLINE To numbers_as(V v) {
  if constexpr (kIsPair<V> || kIsPair<To>) {
    const auto halves = halves_of(v);
    return join<To>({numbers_as<HalfOf<To>>(halves.low), numbers_as<HalfOf<To>>(halves.high)});
  } else {
    return __builtin_convertvector(v, To);
  }
}

// 0, 1, 2, and so on.
template <typename V>
inline V places() {
  Element<V> numbers[kElementsOf<V>];
  for (int i = 0; i < kElementsOf<V>; ++i) numbers[i] = static_cast<Element<V>>(i);
  return load_vector<V>(numbers);
}

// Whether an element of a mask is not 0.
template <typename M>
inline bool any(M mask) {
  if constexpr (kIsPair<M>) {
    return any(mask.low | mask.high);
  } else {
    bool found = false;
    for (int i = 0; i < kElementsOf<M>; ++i) found = found || mask[i] != 0;
    return found;
  }
}

}  // namespace multibatch
