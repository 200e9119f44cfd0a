// A compiled program that runs without Python's lock. PyTorch's binding of the loader keeps the lock while it runs
// (pytorch/pytorch#197516), so that an event loop of the same process would stand still for as long as a step takes; methods
// of custom classes give it back.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace multibatch {

class Program : public torch::CustomClassHolder {
 public:
  // One call at a time, and no thread of the loader's own.
  explicit Program(const std::string& path) : loader_(path, "model", /*run_single_threaded=*/true) {}

  std::vector<std::string> constant_names() { return loader_.get_constant_fqns(); }

  // Every constant by name. They are not copied: whoever gives them keeps them.
  void set_constants(const c10::Dict<std::string, at::Tensor>& constants) {
    std::unordered_map<std::string, at::Tensor> by_name;
    for (const auto& entry : constants) by_name.emplace(entry.key(), entry.value());
    loader_.load_constants(by_name, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return loader_.boxed_run(std::move(inputs)); }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

}  // namespace multibatch

TORCH_LIBRARY_FRAGMENT(multibatch, library) {
  library.class_<multibatch::Program>("Program")
      .def(torch::init<std::string>())
      .def("constant_names", &multibatch::Program::constant_names)
      .def("set_constants", &multibatch::Program::set_constants)
      .def("run", &multibatch::Program::run);
}
