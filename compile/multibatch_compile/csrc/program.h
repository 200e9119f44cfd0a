// A compiled program that runs without Python's lock. PyTorch's binding of the loader keeps the lock while it runs
// (pytorch/pytorch#197516), so that an event loop of the same process would stand still for as long as a step takes; methods
// of custom classes give it back. It can also be started, to run on the operators' threads while Python goes on, and be told
// beforehand what to run next: where the tokens of one run are all that the next one lacks, nobody need be there in between.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "thread_pool.h"

namespace multibatch {

class Program : public torch::CustomClassHolder {
 public:
  // One call at a time, and no thread of the loader's own.
  explicit Program(const std::string& path) : loader_(path, "model", /*run_single_threaded=*/true) {}

  std::vector<std::string> constant_names() { return loader_.get_constant_fqns(); }

  // Every constant by name. They are not copied, and kept for as long as the program.
  void set_constants(const c10::Dict<std::string, at::Tensor>& constants) {
    std::unordered_map<std::string, at::Tensor> by_name;
    for (const auto& entry : constants) by_name.emplace(entry.key(), entry.value());
    constants_ = by_name;
    loader_.load_constants(by_name, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  // What each call gets behind its inputs from now on. To hand tensors over one by one costs a microsecond or two each.
  void bind(std::vector<at::Tensor> others) {
    check_is_free();
    others_ = std::move(others);
  }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) {
    check_is_free();
    return loader_.boxed_run(arguments(inputs));
  }

  // Begins a run and returns. Where no thread is free for it, `finish` runs it. Its tokens are those that `draw_tokens` gives of
  // its first output with these options and this scale, or the first maxima where there are no options. Gives the run's number;
  // the run that follows it has the next one.
  int64_t start(std::vector<at::Tensor> inputs, std::vector<at::Tensor> draws, double scale) {
    check_is_free();
    runs_[current_].reset(std::move(inputs), std::move(draws), scale);
    is_started_ = true;
    is_driven_ = ThreadPool::instance().drive(drive_);
    return number_;
  }

  // Has another run begin as soon as the one that was started ends, with the first `num_tokens` of its tokens as the first of its
  // inputs; unless one of them is among `stops`, or none at all, or the run fails. False where no thread would do it, and where
  // something was withdrawn before: the driver may be reading that.
  bool follow(std::vector<at::Tensor> inputs, int64_t num_tokens, std::vector<int64_t> stops, std::vector<at::Tensor> draws,
              double scale) {
    TORCH_CHECK(is_started_, "Program.follow: it was not started");
    const int next = next_.load(std::memory_order_acquire);
    TORCH_CHECK(next != kOffered && next != kBegun, "Program.follow: another run follows already; finish this one first");
    const at::Tensor& ids = inputs.at(0);
    TORCH_CHECK(ids.scalar_type() == at::kLong && ids.is_contiguous() && num_tokens >= 1 && num_tokens <= ids.numel(),
                "Program.follow: ", num_tokens, " tokens for the first input of ", ids.numel(), "; allowed: int64, 1 to that many");
    const std::vector<at::Tensor>& drawn = runs_[current_].draws;
    TORCH_CHECK(drawn.empty() || drawn[0].numel() >= num_tokens, "Program.follow: ", num_tokens, " tokens of a run that draws ",
                drawn.empty() ? 0 : drawn[0].numel());
    if (!is_driven_ || next == kWithdrawn) return false;
    runs_[1 - current_].reset(std::move(inputs), std::move(draws), scale);
    num_tokens_ = num_tokens;
    stops_ = std::move(stops);
    std::sort(stops_.begin(), stops_.end());
    next_.store(kOffered, std::memory_order_release);
    return true;
  }

  // Takes back what `follow` asked for, unless it has begun. From any thread.
  void withdraw() { decide(kWithdrawn); }

  // Ends the run, the calling thread helping: its outputs, its tokens, how many seconds it took, how many have passed since, and
  // whether the run that was to follow has begun. A run is finished once: who was interrupted in it must not get the next one's.
  std::tuple<std::vector<at::Tensor>, at::Tensor, double, double, bool> finish(int64_t number) {
    TORCH_CHECK(is_started_ && number == number_, "Program.finish: run ", number, " was not started, or is finished");
    Run& run = runs_[current_];
    await(run);
    run.inputs.clear();
    run.draws.clear();
    const bool is_followed = next_.exchange(kNone, std::memory_order_acq_rel) == kBegun;
    is_started_ = is_followed;
    ++number_;
    if (is_followed) current_ = 1 - current_;
    if (run.error) std::rethrow_exception(std::exchange(run.error, nullptr));
    const double late = std::chrono::duration<double>(Clock::now() - run.end).count();
    return {std::move(run.outputs), std::move(run.tokens), run.seconds, late, is_followed};
  }

  // Ends runs that nobody will finish.
  void settle() {
    withdraw();
    if (is_started_ && is_driven_) {
      await(runs_[current_]);
      if (next_.load(std::memory_order_acquire) == kBegun) await(runs_[1 - current_]);
    }
    next_.store(kNone);
    if (is_started_) number_ += 2;
    is_started_ = false;
  }

  ~Program() override { settle(); }

 private:
  using Clock = std::chrono::steady_clock;
  // Whether a run is to follow the one that runs.
  static constexpr int kNone = 0, kOffered = 1, kBegun = 2, kWithdrawn = 3;

  struct Run {
    std::vector<at::Tensor> inputs, draws, outputs;
    double scale = 0;  // of the draws
    at::Tensor tokens;
    std::exception_ptr error;
    double seconds = 0;
    Clock::time_point end;
    std::atomic<bool> is_done{false};

    void reset(std::vector<at::Tensor> given, std::vector<at::Tensor> options, double draw_scale) {
      TORCH_CHECK(options.empty() || options.size() == 5, "Program: ", options.size(), " options of draws; allowed: 5 or none");
      inputs = std::move(given);
      draws = std::move(options);
      scale = draw_scale;
      error = nullptr;
      is_done.store(false);
    }
  };

  void check_is_free() const { TORCH_CHECK(!is_started_, "the program was started already; finish it first"); }

  void await(Run& run) {
    if (is_driven_) {
      ThreadPool::instance().help(run.is_done);
    } else {
      call(run);
    }
  }

  void call(Run& run) {
    const auto begin = Clock::now();
    try {
      run.outputs = loader_.boxed_run(arguments(run.inputs));
      run.tokens = tokens_of(run);
    } catch (...) {
      run.error = std::current_exception();
    }
    run.end = Clock::now();
    run.seconds = std::chrono::duration<double>(run.end - begin).count();
  }

  static at::Tensor tokens_of(const Run& run) {
    const at::Tensor& logits = run.outputs.at(0);
    if (run.draws.empty()) return first_maxima(logits);
    const std::vector<at::Tensor>& d = run.draws;
    return draw_tokens(logits.narrow(0, 0, d[0].numel()), d[0], d[1], d[2], d[3], d[4], run.scale);
  }

  // One run after the other, for as long as each is to be followed. Whoever waits for one is told once it is known whether it is.
  std::atomic<bool>* drive() {
    for (int i = current_;; i = 1 - i) {
      call(runs_[i]);
      if (!feed(runs_[i], runs_[1 - i])) return &runs_[i].is_done;
      runs_[i].is_done.store(true, std::memory_order_release);
    }
  }

  // Gives the run that is to follow its tokens, if there is one and it can have them.
  bool feed(const Run& run, Run& next) {
    if (run.error || ThreadPool::instance().is_driver_wanted()) return false;
    if (next_.load(std::memory_order_acquire) != kOffered) return false;
    const int64_t* tokens = run.tokens.const_data_ptr<int64_t>();
    const bool can_go_on = std::none_of(tokens, tokens + num_tokens_, [this](int64_t token) {
      return token < 0 || std::binary_search(stops_.begin(), stops_.end(), token);
    });
    if (!can_go_on || !decide(kBegun)) return false;
    std::copy_n(tokens, num_tokens_, next.inputs[0].data_ptr<int64_t>());
    return true;
  }

  // What becomes of the run that was offered, if nobody was quicker.
  bool decide(int becomes) {
    int offered = kOffered;
    return next_.compare_exchange_strong(offered, becomes, std::memory_order_acq_rel);
  }

  // Owners of their own: the last one of a tensor that Python made needs Python's lock to let it go.
  std::vector<at::Tensor> arguments(const std::vector<at::Tensor>& inputs) const {
    std::vector<at::Tensor> all;
    all.reserve(inputs.size() + others_.size());
    all.insert(all.end(), inputs.begin(), inputs.end());
    all.insert(all.end(), others_.begin(), others_.end());
    return all;
  }

  std::unordered_map<std::string, at::Tensor> constants_;
  torch::inductor::AOTIModelPackageLoader loader_;
  const std::function<std::atomic<bool>*()> drive_{[this] { return drive(); }};
  std::vector<at::Tensor> others_;
  Run runs_[2];
  std::atomic<int> next_{kNone};
  int64_t num_tokens_ = 0;
  std::vector<int64_t> stops_;
  int current_ = 0;  // the run that `finish` ends
  int64_t number_ = 0;  // of that run
  bool is_started_ = false, is_driven_ = false;
};

}  // namespace multibatch

TORCH_LIBRARY_FRAGMENT(multibatch, library) {
  library.class_<multibatch::Program>("Program")
      .def(torch::init<std::string>())
      .def("constant_names", &multibatch::Program::constant_names)
      .def("set_constants", &multibatch::Program::set_constants)
      .def("bind", &multibatch::Program::bind)
      .def("run", &multibatch::Program::run)
      .def("start", &multibatch::Program::start)
      .def("follow", &multibatch::Program::follow)
      .def("withdraw", &multibatch::Program::withdraw)
      .def("finish", &multibatch::Program::finish)
      .def("settle", &multibatch::Program::settle);
}
