// rlnas_fast._cuda: kernels on raw device pointers, sizes, strides and the caller's stream.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

// Each operation binds itself, in the file that launches it.
void register_nonlocal_attention(py::module_& module);
void register_masked_matmul(py::module_& module);

PYBIND11_MODULE(_cuda, module) {
  module.def(
      "cuda_runtime_version",
      [] {
        int version = 0;
        cudaRuntimeGetVersion(&version);
        return version;
      },
      "The CUDA runtime this module was built with, such as 13000; needs no driver.");
  register_nonlocal_attention(module);
  register_masked_matmul(module);
}
