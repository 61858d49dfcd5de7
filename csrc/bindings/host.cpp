// What this installation was built with, which instruction sets this processor runs, and the process's allocator.
#include <pybind11/pybind11.h>

#if defined(__GLIBC__)
#include <malloc.h>

#include <climits>
#endif

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

// Keeps freed memory in the heap, of whatever size, instead of returning its pages to the system at every free.
static bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, INT_MAX);
#else
  return false;
#endif
}

PYBIND11_MODULE(_host, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = EFFNET_FAST_TORCH_VERSION;
  m.def("supported_isas", &supported_isas);
  m.def("keep_freed_memory", &keep_freed_memory);
}
