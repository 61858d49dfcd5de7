// What this installation was built with: read by `python -m effnet_fast.doctor`.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("cxx_standard") = static_cast<long>(__cplusplus);
  m.attr("torch_version") = EFFNET_FAST_TORCH_VERSION;
}
