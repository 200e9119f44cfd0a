// The linear kernel against plain loops, as a program of its own: it needs PyTorch's headers and not its libraries, so a
// cross compiler and an emulator run it for processors that are not at hand. Prints what is wrong; exits with how many.
#include <cmath>
#include <cstdio>
#include <random>

#include "packed_linear.h"

using namespace multibatch;

template <typename W, typename T>
struct Case {
  using Lane = typename Format<W>::Lane;
  using Sum = typename LinearCall<W, T>::Sum;
  static constexpr bool kIsInt8 = std::is_same_v<W, int8_t>, kIsInt4 = std::is_same_v<W, Nibbles>;
  static constexpr int unit = Format<W>::unit;
  int64_t M, K, N, units = units_of<W>(K);
  std::vector<W> packed = std::vector<W>((N + kPanel - 1) / kPanel * units * kUnitBytes<W> / sizeof(W), W{});
  std::vector<double> weight = std::vector<double>(N * K);
  std::vector<float> scales = std::vector<float>(N), x_scales = std::vector<float>(M);
  std::vector<Sum> sums = std::vector<Sum>(N);
  std::vector<T> x = std::vector<T>(M * K), bias = std::vector<T>(N), residual = std::vector<T>(M * N), y = std::vector<T>(M * N);

  void draw() {
    std::mt19937 generator(static_cast<uint32_t>(M * K + N));
    std::normal_distribution<float> normal;
    for (auto* numbers : {&x, &bias, &residual})
      for (T& v : *numbers) v = static_cast<T>(normal(generator));
    for (int64_t n = 0; n < N; ++n) {
      scales[n] = kIsInt8 ? 0.01f + 0.001f * static_cast<float>(n) : 1.0f;
      for (int64_t k = 0; k < K; ++k) weight[n * K + k] = put(n, k, normal(generator));
    }
  }

  // Rounds a weight, puts it where it belongs, and gives what it is then.
  double put(int64_t n, int64_t k, float v) {
    if constexpr (kIsInt4) {
      const int64_t group = n / kPanel * units * 2 + k / Nibbles::group, i = k % Nibbles::group;
      const auto scale = static_cast<c10::BFloat16>(0.01f + 0.001f * static_cast<float>((n + group) % 50));
      const int value = static_cast<int>(std::nearbyint(std::fmax(-8.0f, std::fmin(7.0f, 3 * v))));
      uint8_t* const at = &packed[0].both + group * Nibbles::group_bytes;
      at[(i / 8 * kPanel + n % kPanel) * 4 + i % 4] |= static_cast<uint8_t>((value & 15) << (i % 8 / 4 * 4));
      std::memcpy(at + Nibbles::group / 2 * kPanel + n % kPanel * sizeof(scale), &scale, sizeof(scale));
      sums[n] += static_cast<float>(scale) * static_cast<float>(value);
      return static_cast<double>(static_cast<float>(scale)) * value;
    } else {
      const W w = static_cast<W>(kIsInt8 ? std::nearbyint(std::fmax(-127.0f, std::fmin(127.0f, 40 * v))) : v);
      if constexpr (kIsInt8) sums[n] += w;
      packed[n / kPanel * kPanel * units * unit + k / unit * unit * kPanel + n % kPanel * unit + k % unit] = w;
      return scales[n] * static_cast<float>(w);
    }
  }

  void compute() {
    const int64_t lanes = units * Format<W>::lanes, distance = M * kChunkStride;
    std::vector<Lane> laid_out((lanes + kChunk - 1) / kChunk * distance);
    for (int64_t r = 0; r < M; ++r) {
      Lane* const to = laid_out.data() + r * kChunkStride;
      if constexpr (kQuantized<W>) {
        x_scales[r] = row_scale(x.data() + r * K, K);
        quantize_row(x.data() + r * K, K, lanes, x_scales[r], to, distance);
      } else {
        pack_row<W>(x.data() + r * K, K, lanes, to, distance);
      }
    }
    LinearCall<W, T> call{};
    call.packed = packed.data(), call.bias = bias.data(), call.scales = scales.data(), call.sums = sums.data();
    call.x = laid_out.data(), call.x_scales = x_scales.data(), call.residual = residual.data(), call.y = y.data();
    call.M = M, call.N = N, call.units = units;
    const Tiling tiling(M, N, false, lanes * sizeof(Lane));
    for (int64_t tile = 0; tile < tiling.count(); ++tile) linear_tile(call, tiling, tile);
  }

  double expected(int64_t r, int64_t n) const {
    double s = static_cast<float>(bias[n]);
    for (int64_t k = 0; k < K; ++k) {
      const float v = static_cast<float>(x[r * K + k]);
      s += (kQuantized<W> ? std::nearbyint(v / x_scales[r]) * x_scales[r] : v) * weight[n * K + k];
    }
    return static_cast<float>(static_cast<T>(static_cast<float>(s))) + static_cast<float>(residual[r * N + n]);
  }

  int is_wrong() {
    draw();
    compute();
    double worst = 0;
    for (int64_t r = 0; r < M; ++r)
      for (int64_t n = 0; n < N; ++n) {
        const double right = expected(r, n), error = std::fabs(right - static_cast<float>(y[r * N + n])) / (1 + std::fabs(right));
        worst = error <= worst ? worst : error;  // a NaN is the worst
      }
    const bool is_right = worst <= (sizeof(T) == 4 ? 1e-4 : std::is_same_v<T, c10::Half> ? 1e-3 : 8e-3);
    if (!is_right) std::printf("%s%ld x %ld x %ld: off by %.2g\n", kIsInt8 ? "int8 " : kIsInt4 ? "int4 " : "", (long)M, (long)K, (long)N, worst);
    return is_right ? 0 : 1;
  }
};

int main() {
  int wrong = 0;
  // Rows of one group, two and many; inputs beyond one chunk; outputs that do not fill a panel.
  const int64_t shapes[][3] = {{1, 64, 96}, {3, 33, 70}, {13, 128, 32}, {16, 1030, 40}, {25, 64, 33}, {40, 17, 1}, {30, 1100, 40}, {60, 1100, 140}};
  for (const auto& [M, K, N] : shapes) {
    wrong += Case<float, float>{M, K, N}.is_wrong() + Case<c10::Half, c10::Half>{M, K, N}.is_wrong();
    wrong += Case<c10::BFloat16, c10::BFloat16>{M, K, N}.is_wrong();
    wrong += Case<int8_t, float>{M, K, N}.is_wrong() + Case<int8_t, c10::BFloat16>{M, K, N}.is_wrong();
    wrong += Case<Nibbles, float>{M, K, N}.is_wrong() + Case<Nibbles, c10::BFloat16>{M, K, N}.is_wrong();
  }
  return wrong;
}
