// A pool of threads that take small tiles of one job. Each begins with a range of neighbours, so that what it reads (and
// fetches ahead) is one stream, and then takes what is left of the others' ranges, whichever thread is awake.
//
// Why not OpenMP: its parallel regions end when every thread has arrived, so one neighbour on one core
// costs every region a scheduler time slice. Here a job ends when its tiles are done; a thread that the
// operating system put aside merely takes fewer of them, and holds back at worst the few in its hand. When that
// happens in a job of short tiles, a worker rests for a while: its core goes to whom the others had to share theirs with,
// and fewer threads that are never put aside finish sooner than all of them where one is, every few milliseconds, in the
// middle of a tile. A job of long tiles takes many of those milliseconds anyway, and is done sooner by all.
//
// A worker can also drive: it runs a program, job by job, while the thread that asked for it does something else and comes
// back to help. So that thread's work costs the program a share of one thread, and neither waits for the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/resource.h>
#endif

#include "caches.h"

namespace multibatch {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What a job reads: pieces that lie one after the other, one for each tile.
struct Stream {
  const char* data = nullptr;
  int64_t tiles = 0, tile_bytes = 0;
};

class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }

  // Threads that work on a job, the calling one included. Ends and starts workers; not while a job runs.
  void resize(int num_threads) {
    become_driver();  // first: a driver needs the lock to end
    while (helpers_.load(std::memory_order_seq_cst) > 0) std::this_thread::yield();  // of the program that ended last
    std::lock_guard<std::mutex> one_caller(run_mutex_);
    stop();
    resting_.store(0);
    num_workers_ = num_threads - 1;
    ranges_ = std::vector<Range>(num_threads);
    fetched_ = std::vector<Fetched>(num_threads);
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { work(i); });
    driving_.store(kNobody, std::memory_order_release);
  }

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Says what will probably be read after the next job. Threads without a tile fetch the beginning of their share of it
  // into their own caches. It need not be there any more: a fetch of memory that was given back does nothing.
  void expect(Stream stream) {
    expected_tiles_.store(stream.tiles, std::memory_order_relaxed);
    expected_tile_bytes_.store(stream.tile_bytes, std::memory_order_relaxed);
    expected_data_.store(stream.data, std::memory_order_release);  // who sees it sees the others
  }

  // Calls fn(tile) for every tile in [0, num_tiles), in any order and on any thread; returns when all are done. Tiles are
  // long if one alone may take a millisecond.
  void run(int64_t num_tiles, const std::function<void(int64_t)>& fn, bool are_long = false) {
    if (num_tiles <= 0) return;
    std::lock_guard<std::mutex> one_caller(run_mutex_);
    if (num_tiles == 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_tiles; ++i) fn(i);
      return;
    }
    if (are_long && resting_.load() > 0) end_rest();
    job_ = &fn;
    are_long_ = are_long;
    done_.store(0, std::memory_order_relaxed);
    const int self = place();
    for (int i = 0; i < num_threads(); ++i)
      ranges_[i].store(num_tiles * i / num_threads(), num_tiles * (i + 1) / num_threads());
    // One for all ranges, which other cores hold until now. It is what wake_sleepers needs: who went to sleep has seen none of
    // these tiles, and so is seen here.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    wake_sleepers();
    take_tiles(self);
    // Every tile was handed out; those of other threads may still run.
    while (done_.load(std::memory_order_acquire) < num_tiles) fetch_or_relax(self);
  }

  // Has a worker call `program`, which calls run(), and set the flag that it returns as the last thing. False where no worker is
  // free for it: nothing was called. Both must stay until then; `program` must not throw.
  bool drive(const std::function<std::atomic<bool>*()>& program) {
    int nobody = kNobody;
    if (workers_.empty() || !driving_.compare_exchange_strong(nobody, kTaken, std::memory_order_acq_rel)) return false;
    program_ = &program;
    driving_.store(kReady, std::memory_order_seq_cst);
    wake_sleepers();
    return true;
  }

  // Whether somebody waits for the driver to end, so that it should begin nothing new.
  bool is_driver_wanted() const { return num_waiting_.load(std::memory_order_relaxed) > 0; }

  // Takes tiles of a driven program until it is done.
  void help(const std::atomic<bool>& is_done) {
    helpers_.fetch_add(1, std::memory_order_seq_cst);
    while (!is_done.load(std::memory_order_acquire)) {
      take_tiles(0);
      for (int i = 0; i < 32 && !ranges_[0].has_tiles() && !is_done.load(std::memory_order_acquire); ++i) fetch_or_relax(0);
    }
    helpers_.fetch_sub(1, std::memory_order_seq_cst);
  }

  ~ThreadPool() {
    become_driver();
    stop();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr uint64_t kNext = 0xffffffffu;
  // Whether anybody drives, or is about to.
  static constexpr int kNobody = 0, kTaken = 1, kReady = 2;
  // The worker that drives: the last one to be sent to rest.
  static constexpr int kDriver = 1;
  // Longer than the gaps between two operations and between two steps, shorter than what a neighbour would miss.
  static constexpr std::chrono::microseconds kSpin{1000};
  // Tiles that are taken at once. To take some, and to say that they are done, waits until what a thread wrote before has
  // arrived, and outputs go to lines that other cores hold.
  static constexpr int64_t kMostTaken = 8;
  static constexpr std::chrono::microseconds kSlowTiles{1000};  // that were taken at once
  static constexpr std::chrono::milliseconds kNeighbour{20}, kRest{50}, kLongestRest{800};

  struct Tiles {
    int64_t first = 0, end = 0;
    bool any() const { return first < end; }
  };

  // Tiles [next, end) that a thread is to take first; then others help it.
  class alignas(64) Range {
   public:
    void store(uint64_t next, uint64_t end) { state_.store(end << 32 | next, std::memory_order_release); }
    bool has_tiles() const { return left(state_.load(std::memory_order_seq_cst)) > 0; }
    // Half of what is left, `most` at most. One fetch_add reads the end and takes them at once. A tile so taken is not done yet, so
    // run() cannot have returned, so job_ is the job that the tile belongs to, however late this thread comes.
    Tiles take(int64_t most) {
      const int64_t seen = left(state_.load(std::memory_order_seq_cst));
      if (seen <= 0) return {};
      const int64_t n = std::min(std::max<int64_t>(seen / 2, 1), most);
      const uint64_t t = state_.fetch_add(n, std::memory_order_acq_rel);
      const int64_t first = t & kNext;
      return {first, first + std::min(n, left(t))};
    }

   private:
    static int64_t left(uint64_t state) {
      return static_cast<int64_t>(state >> 32) - static_cast<int64_t>(state & kNext);
    }
    std::atomic<uint64_t> state_{0};
  };

  // The thread's range: a worker's own, and the first for every thread of others.
  static int& place() {
    static thread_local int place = 0;
    return place;
  }

  bool must_drive(int worker) const {
    return worker == kDriver && driving_.load(std::memory_order_seq_cst) == kReady;
  }

  void drive_program() {
    driving_.store(kTaken, std::memory_order_relaxed);
    std::atomic<bool>* is_done = (*program_)();
    driving_.store(kNobody, std::memory_order_release);
    is_done->store(true, std::memory_order_release);
  }

  // Waits until nobody drives, and lets nobody begin.
  void become_driver() {
    num_waiting_.fetch_add(1);
    int nobody = kNobody;
    while (!driving_.compare_exchange_weak(nobody, kTaken, std::memory_order_acq_rel)) {
      nobody = kNobody;
      std::this_thread::yield();
    }
    num_waiting_.fetch_sub(1);
  }

  void wake_sleepers() {
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    { std::lock_guard<std::mutex> lock(sleep_mutex_); }
    wake_.notify_all();
  }

  bool has_tiles() const {
    return std::any_of(ranges_.begin(), ranges_.begin() + num_workers_ + 1, [](const Range& r) { return r.has_tiles(); });
  }

  Tiles take(int thread) {
    const int64_t most = are_long_ ? 1 : kMostTaken;
    for (int i = 0; i <= num_workers_; ++i) {
      const Tiles tiles = ranges_[(thread + i) % (num_workers_ + 1)].take(most);
      if (tiles.any()) return tiles;
    }
    return {};
  }

  // Tiles are counted as done when there are no more.
  void take_tiles(int thread) {
    Tiles tiles = take(thread);
    if (!tiles.any()) return;
    int64_t taken = 0;
    Clock::time_point before = Clock::now();
    for (; tiles.any(); tiles = take(thread)) {
      for (int64_t tile = tiles.first; tile < tiles.end; ++tile) (*job_)(tile);
      taken += tiles.end - tiles.first;
      const Clock::time_point after = Clock::now();
      if (after - before > kSlowTiles && !are_long_ && was_put_aside()) put_aside(after);
      before = after;
    }
    done_.fetch_add(taken, std::memory_order_acq_rel);
  }

  // Whether the system took the core from this thread since it last asked.
  static bool was_put_aside() {
#ifdef __linux__
    static thread_local long last = 0;
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return std::exchange(last, usage.ru_nivcsw) != usage.ru_nivcsw;
#else
    return false;
#endif
  }

  // Sends one more worker to rest where there is a neighbour, who comes every few milliseconds; for longer, if the last rest has
  // just ended. What happens once is over.
  void put_aside(Clock::time_point now) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    const bool is_neighbour = now - std::exchange(put_aside_at_, now) < kNeighbour;
    if (!is_neighbour || (now < rest_until_ && resting_.load() > 0 && now - rest_since_ < kRest / 4)) return;
    rest_ = now - rest_until_ < kRest ? std::min(rest_ * 2, kLongestRest) : kRest;
    rest_since_ = now;
    rest_until_ = now + rest_;
    resting_.store(std::min(resting_.load() + 1, std::max(num_workers_ - 1, 0)));
  }

  void end_rest() {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    rest_until_ = Clock::now();
    resting_.store(0);
    wake_up_.notify_all();
  }

  // A thread's place in what is expected. Atomic, as threads of others may share the first.
  struct alignas(64) Fetched {
    std::atomic<const char*> data{nullptr};
    std::atomic<int64_t> next{0}, end{0};
  };

  // Fetches a line of what is expected, as long as the thread's share has one and half of its own cache has room; else waits
  // a moment.
  void fetch_or_relax(int thread) {
    constexpr auto relaxed = std::memory_order_relaxed;
    Fetched& f = fetched_[thread];
    const char* data = expected_data_.load(std::memory_order_acquire);
    if (f.data.load(relaxed) != data) {
      const int64_t tiles = expected_tiles_.load(relaxed), n = num_workers_ + 1;
      const int64_t bytes = expected_tile_bytes_.load(relaxed), first = tiles * thread / n * bytes;
      f.data.store(data, relaxed);
      f.next.store(first, relaxed);
      f.end.store(std::min(first + second_level_cache() / 2, tiles * (thread + 1) / n * bytes), relaxed);
    }
    const int64_t next = f.next.load(relaxed);
    if (next < f.end.load(relaxed)) {
      __builtin_prefetch(data + next, 0, 2);
      f.next.store(next + 64, relaxed);
    } else {
      cpu_relax();
    }
  }

  bool must_rest(int worker) const { return worker > num_workers_ - resting_.load(); }

  void rest() {
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    while (!stopping_.load() && Clock::now() < rest_until_) wake_up_.wait_until(lock, rest_until_);
    resting_.store(0);
  }

  void work(int worker) {
    place() = worker;
    while (true) {
      if (must_drive(worker)) drive_program();
      if (must_rest(worker)) rest();
      take_tiles(worker);
      spin(worker);
      if (stopping_.load()) return;
      if (has_tiles() || must_rest(worker) || must_drive(worker)) continue;
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [this, worker] { return has_tiles() || must_drive(worker) || stopping_.load(); });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      if (stopping_.load()) return;
    }
  }

  // Waits for work without giving the core away, for a while.
  void spin(int worker) {
    const auto until = Clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {  // a pause takes 4 to 140 cycles, by processor
        if (ranges_[worker].has_tiles() || must_drive(worker) || stopping_.load(std::memory_order_relaxed)) return;
        fetch_or_relax(worker);
      }
    } while (!has_tiles() && Clock::now() < until);
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
      stopping_.store(true);
    }
    wake_.notify_all();
    wake_up_.notify_all();
    for (auto& w : workers_) w.join();
    workers_.clear();
    stopping_.store(false);
  }

  std::vector<std::thread> workers_;
  int num_workers_ = 0;  // as workers_.size(), but steady before the first of them starts
  std::mutex run_mutex_;  // two engines in one process take turns
  std::mutex sleep_mutex_;
  std::condition_variable wake_;     // there are tiles
  std::condition_variable wake_up_;  // a rest is over
  Clock::time_point put_aside_at_{}, rest_since_{}, rest_until_{};
  std::chrono::milliseconds rest_ = kRest;
  std::atomic<int> resting_{0};  // workers that take no tiles, the last ones
  const std::function<void(int64_t)>* job_ = nullptr;
  const std::function<std::atomic<bool>*()>* program_ = nullptr;
  std::atomic<int> driving_{kNobody}, num_waiting_{0}, helpers_{0};
  std::atomic<bool> are_long_{false};  // the job's tiles
  std::vector<Range> ranges_{1};  // of each thread, the caller's first
  std::vector<Fetched> fetched_{1};
  std::atomic<const char*> expected_data_{nullptr};
  std::atomic<int64_t> expected_tiles_{0}, expected_tile_bytes_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace multibatch
