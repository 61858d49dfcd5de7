// The CUDA passes in torch's dispatcher, on the stable ABI. Importing the module registers them.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda_passes.h"

namespace effnet_fast {

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) : guard_(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

void check_device(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cuda(), name, ": must be on a CUDA device"); }

Launch launch_on(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, t.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return {(cudaStream_t)stream, 1, multiprocessors};
}

void check_launch(const char* pass) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, pass, ": ", cudaGetErrorString(error));
}

}  // namespace effnet_fast

STABLE_TORCH_LIBRARY_IMPL(effnet_fast, CUDA, m) { EFFNET_FAST_REGISTER_PASSES(m); }

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, nullptr};
  PyObject* m = PyModule_Create(&module);
  // the first of the architectures that the kernels were compiled for, as 80 for 8.0
  if (m) PyModule_AddIntConstant(m, "lowest_capability", EFFNET_FAST_LOWEST_CAPABILITY);
  return m;
}
