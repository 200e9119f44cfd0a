// A compiled program that runs without Python's lock. PyTorch's binding of the loader keeps the lock while it runs
// (pytorch/pytorch#197516), so that an event loop of the same process would stand still for as long as a step takes; methods
// of custom classes give it back. It can also be started, to run on the operators' threads while Python goes on.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

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

  // Begins a run and returns. Where no thread is free for it, `finish` runs it.
  void start(std::vector<at::Tensor> inputs) {
    check_is_free();
    inputs_ = std::move(inputs);
    is_done_.store(false);
    is_started_ = true;
    is_driven_ = ThreadPool::instance().drive(call_, is_done_);
  }

  // Ends the run, the calling thread helping, and gives its outputs, the first maxima of the first of them, and how many seconds it
  // took.
  std::tuple<std::vector<at::Tensor>, at::Tensor, double> finish() {
    TORCH_CHECK(is_started_, "Program.finish: it was not started");
    await();
    inputs_.clear();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return {std::move(outputs_), std::move(maxima_), seconds_};
  }

  // Ends a run that nobody will finish.
  void settle() {
    if (is_started_ && is_driven_) await();
    is_started_ = false;
    error_ = nullptr;
  }

  ~Program() override { settle(); }

 private:
  void check_is_free() const { TORCH_CHECK(!is_started_, "the program was started already; finish it first"); }

  void await() {
    if (is_driven_) {
      ThreadPool::instance().help(is_done_);
    } else {
      call();
    }
    is_started_ = false;
  }

  void call() {
    const auto begin = std::chrono::steady_clock::now();
    try {
      outputs_ = loader_.boxed_run(arguments(inputs_));
      maxima_ = first_maxima(outputs_.at(0));
    } catch (...) {
      error_ = std::current_exception();
    }
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
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
  const std::function<void()> call_{[this] { call(); }};
  std::vector<at::Tensor> others_, inputs_, outputs_;
  at::Tensor maxima_;
  std::exception_ptr error_;
  double seconds_ = 0;
  std::atomic<bool> is_done_{false};
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
      .def("finish", &multibatch::Program::finish)
      .def("settle", &multibatch::Program::settle);
}
