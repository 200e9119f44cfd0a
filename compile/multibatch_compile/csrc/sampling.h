// Draws tokens, a row to a thread: multibatch/draws.py says what is drawn, and draws the same with PyTorch. Weights are whole
// numbers, so that no order of summation can change a sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "elementwise.h"
#include "numeric.h"

namespace multibatch {

using i64x8 = Vector<int64_t, 8>;

constexpr int64_t kTokenChunk = 128;  // logits per maximum
constexpr int64_t kNucleusHead = 128;  // likeliest tokens that top_p tries first
constexpr int64_t kNucleusBins = 2048;
constexpr float kBinsPerNat = 64.0f;

struct DrawOptions {
  float temperature;  // 0: the first of the highest
  int64_t top_k;      // 0 or less: all
  double top_p, log_min_p;  // log_min_p -inf: none
  int64_t random;     // 53 bits
  double scale;       // of weights
};

// exp(x / temperature - peak) * scale, rounded down. No x / temperature is above the peak.
struct WeightOf {
  float temperature, peak, scale;

  // Calls fn(first, weights of 8 neighbours) over n logits; weights behind the last are 0.
  template <typename T, typename F>
  void for_eights(const T* logits, int64_t n, const F& fn) const {
    for (int64_t i = 0; i < n; i += 16) {
      f32x16 x = floats_of(logits + i, n - i);
      if (n - i < 16) x = select(places<i32x16>() < static_cast<int32_t>(n - i), x, splat(-std::numeric_limits<float>::infinity()));
      const auto weights = halves_of(exp_nonpositive(x / temperature - peak) * scale);
      fn(i, numbers_as<i64x8>(weights.low));
      fn(i + 8, numbers_as<i64x8>(weights.high));
    }
  }

  template <typename T>
  int64_t sum(const T* logits, int64_t n) const {
    i64x8 total{};
    for_eights(logits, n, [&](int64_t, i64x8 weights) { total += weights; });
    int64_t all = 0;
    for (int i = 0; i < 8; ++i) all += total[i];
    return all;
  }

  template <typename T>
  void each(const T* logits, int64_t n, int64_t* out) const {
    for_eights(logits, n, [&](int64_t first, i64x8 weights) {
      for (int64_t i = 0; i < std::min<int64_t>(8, n - first); ++i) out[first + i] = weights[i];
    });
  }
};

// The part of `total` that the random number points at.
inline int64_t target_of(int64_t random, int64_t total) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(random) * static_cast<uint64_t>(total) >> 53);
}

// One row: logits [V].
template <typename T>
class Draw {
 public:
  Draw(const T* logits, int64_t count, const DrawOptions& options) : logits_(logits), count_(count), options_(options) {}

  // The token, or -1 where the highest score is no finite number.
  int64_t token() {
    const Highest best = highest(logits_, count_);
    const float peak = best.value / (options_.temperature == 0.0f ? 1.0f : options_.temperature);
    if (best.nan || !std::isfinite(peak)) return -1;
    if (options_.temperature == 0.0f) return best.place;
    weight_ = {options_.temperature, peak, static_cast<float>(options_.scale)};
    const bool has_top_k = options_.top_k > 0 && options_.top_k < count_;
    if (has_top_k || std::isfinite(options_.log_min_p)) {
      find(has_top_k ? options_.top_k : 0, static_cast<float>(static_cast<double>(peak) + options_.log_min_p));
      if (options_.top_p < 1.0) cut(needed_of(found_weight()));
      return draw_found();
    }
    if (options_.top_p >= 1.0) return draw_any();
    const int64_t needed = needed_of(weight_.sum(logits_, count_));
    if (count_ > kNucleusHead) find(kNucleusHead, -std::numeric_limits<float>::infinity());
    if (count_ <= kNucleusHead || found_weight() < needed) find_all();
    cut(needed);
    return draw_found();
  }

 private:
  struct Candidate {
    float score;
    int64_t weight, token;
  };

  float score(int64_t token) const { return to_float(logits_[token]) / options_.temperature; }
  int64_t needed_of(int64_t total) const {
    return static_cast<int64_t>(std::ceil(options_.top_p * static_cast<double>(total)));
  }

  // The k-th highest.
  static float highest_but(std::vector<float>& scores, int64_t k) {
    std::nth_element(scores.begin(), scores.begin() + (k - 1), scores.end(), std::greater<>());
    return scores[k - 1];
  }

  // The `top_k` highest scores (0: all) that reach `bound`, and all that equal the last of them, in the order of the tokens.
  // Only chunks are read whose maximum reaches the k-th highest maximum: at least k scores do, so the k-th does too.
  void find(int64_t top_k, float bound) {
    const int64_t chunks = (count_ + kTokenChunk - 1) / kTokenChunk;
    std::vector<float> maxima(chunks);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = c * kTokenChunk;
      maxima[c] = maximum(logits_ + first, std::min(kTokenChunk, count_ - first)) / options_.temperature;
    }
    if (top_k > 0 && top_k < chunks) {
      std::vector<float> sorted = maxima;
      bound = std::max(bound, highest_but(sorted, top_k));
    }
    std::vector<float> scores;
    found_.clear();
    for (int64_t c = 0; c < chunks; ++c) {
      if (maxima[c] < bound) continue;
      for (int64_t t = c * kTokenChunk; t < std::min((c + 1) * kTokenChunk, count_); ++t)
        if (const float s = score(t); s >= bound) {
          scores.push_back(s);
          found_.push_back({s, 0, t});
        }
    }
    if (top_k > 0 && top_k < static_cast<int64_t>(scores.size())) {
      bound = highest_but(scores, top_k);
      std::erase_if(found_, [&](const Candidate& c) { return c.score < bound; });
    }
    weigh();
  }

  void find_all() {
    found_.resize(count_);
    for (int64_t t = 0; t < count_; ++t) found_[t] = {score(t), 0, t};
    weigh();
  }

  void weigh() {
    std::vector<float> logits(found_.size());
    std::vector<int64_t> weights(found_.size());
    for (size_t i = 0; i < found_.size(); ++i) logits[i] = to_float(logits_[found_[i].token]);
    weight_.each(logits.data(), static_cast<int64_t>(logits.size()), weights.data());
    for (size_t i = 0; i < found_.size(); ++i) found_[i].weight = weights[i];
  }

  int64_t found_weight() const {
    int64_t total = 0;
    for (const Candidate& c : found_) total += c.weight;
    return total;
  }

  // Leaves the fewest highest scores that reach a sum of `needed`; of equals the first ones. Bins by distance from the peak
  // come first, so that only the bin in which the sum is reached needs to be sorted.
  void cut(int64_t needed) {
    std::vector<int64_t> bins(kNucleusBins);
    auto bin_of = [&](const Candidate& c) {
      return static_cast<int64_t>(std::min((weight_.peak - c.score) * kBinsPerNat, kNucleusBins - 1.0f));
    };
    for (const Candidate& c : found_) bins[bin_of(c)] += c.weight;
    int64_t last = 0;
    while (last < kNucleusBins - 1 && bins[last] < needed) needed -= bins[last++];
    std::vector<Candidate> edge;
    for (const Candidate& c : found_)
      if (bin_of(c) == last) edge.push_back(c);
    std::stable_sort(edge.begin(), edge.end(), [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    size_t kept = 0;
    while (kept < edge.size() && needed > 0) needed -= edge[kept++].weight;
    edge.resize(kept);
    std::erase_if(found_, [&](const Candidate& c) { return bin_of(c) >= last; });
    found_.insert(found_.end(), edge.begin(), edge.end());
    std::sort(found_.begin(), found_.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  }

  int64_t draw_found() const {
    int64_t left = target_of(options_.random, found_weight());
    for (const Candidate& c : found_)
      if ((left -= c.weight) < 0) return c.token;
    return -1;
  }

  // Of all tokens: first a chunk by the sums of weights, then one of it.
  int64_t draw_any() const {
    std::vector<int64_t> sums((count_ + kTokenChunk - 1) / kTokenChunk);
    int64_t total = 0;
    for (size_t c = 0; c < sums.size(); ++c)
      total += sums[c] = weight_.sum(logits_ + c * kTokenChunk, std::min<int64_t>(kTokenChunk, count_ - c * kTokenChunk));
    int64_t left = target_of(options_.random, total);
    size_t chunk = 0;
    while (left >= sums[chunk]) left -= sums[chunk++];
    int64_t weights[kTokenChunk];
    const int64_t first = static_cast<int64_t>(chunk) * kTokenChunk;
    weight_.each(logits_ + first, std::min(kTokenChunk, count_ - first), weights);
    int64_t place = 0;
    while (left >= weights[place]) left -= weights[place++];
    return first + place;
  }

  const T* const logits_;
  const int64_t count_;
  const DrawOptions options_;
  WeightOf weight_{};
  std::vector<Candidate> found_;
};

}  // namespace multibatch
