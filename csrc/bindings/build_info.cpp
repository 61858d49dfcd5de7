// What this installation was built with, and which instruction sets this processor runs.
#include <pybind11/pybind11.h>

// Best first. The names are those of the extension modules effnet_fast._cpu_<name>.
static pybind11::list supported_isas() {
  pybind11::list isas;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16"))
    isas.append("avx512");
  if (avx2) isas.append("avx2");
#endif
  isas.append("baseline");
  return isas;
}

PYBIND11_MODULE(_build_info, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = EFFNET_FAST_TORCH_VERSION;
  m.def("supported_isas", &supported_isas);
}
