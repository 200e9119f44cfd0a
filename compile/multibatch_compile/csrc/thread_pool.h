// A pool of threads that hands out small tiles of one job to whichever thread is awake.
//
// Why not OpenMP: its parallel regions end when every thread has arrived, so one neighbour on one core
// costs every region a scheduler time slice. Here a job ends when its tiles are done; a thread that the
// operating system put aside merely takes fewer of them (or, at worst, holds back the one in its hand).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace multibatch {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }

  // Threads that work on a job, the calling one included. Ends and starts workers; not while a job runs.
  void resize(int num_threads) {
    std::lock_guard<std::mutex> one_caller(run_mutex_);
    stop();
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls fn(tile) for every tile in [0, num_tiles), in any order and on any thread; returns when all are done.
  void run(int64_t num_tiles, const std::function<void(int64_t)>& fn) {
    if (num_tiles <= 0) return;
    std::lock_guard<std::mutex> one_caller(run_mutex_);
    if (num_tiles == 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_tiles; ++i) fn(i);
      return;
    }
    job_ = &fn;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(num_tiles) << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_mutex_); }
      wake_.notify_all();
    }
    take_tiles();
    // Every tile was handed out; those of other threads may still run.
    while (done_.load(std::memory_order_acquire) < num_tiles) cpu_relax();
  }

  ~ThreadPool() { stop(); }

 private:
  static constexpr uint64_t kNext = 0xffffffffu;
  // Longer than the gaps between two operations of a step, shorter than what a neighbour would miss.
  static constexpr std::chrono::microseconds kSpin{300};

  bool has_tiles() const {
    uint64_t t = ticket_.load(std::memory_order_seq_cst);
    return (t & kNext) < (t >> 32);
  }

  // One fetch_add reads "how many tiles" and takes "the next tile" at once. A tile so taken is not done yet, so
  // run() cannot have returned, so job_ is the job that the tile belongs to, however late this thread comes.
  void take_tiles() {
    while (has_tiles()) {
      uint64_t t = ticket_.fetch_add(1, std::memory_order_acq_rel);
      if ((t & kNext) >= (t >> 32)) return;
      (*job_)(static_cast<int64_t>(t & kNext));
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  void work() {
    while (true) {
      take_tiles();
      spin();
      if (has_tiles()) continue;
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [this] { return has_tiles() || stopping_.load(); });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      if (stopping_.load()) return;
    }
  }

  // Waits for work without giving the core away, for a while.
  void spin() const {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {  // a pause takes 4 to 140 cycles, by processor
        if (has_tiles() || stopping_.load(std::memory_order_relaxed)) return;
        cpu_relax();
      }
    } while (std::chrono::steady_clock::now() < until);
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_.store(true);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
    stopping_.store(false);
  }

  std::vector<std::thread> workers_;
  std::mutex run_mutex_;  // two engines in one process take turns
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  const std::function<void(int64_t)>* job_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};  // high half: tiles of the job; low half: the next one
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace multibatch
