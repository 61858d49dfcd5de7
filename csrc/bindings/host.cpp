// What this installation was built with, which instruction sets this processor runs, and the process's allocator.
#include <pybind11/pybind11.h>

#if defined(__GLIBC__)
#include <malloc.h>

#include <climits>
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether the processor has tile registers for bf16 and the kernel lets this process use them, for which it must be asked.
static bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Best first. The names are those of the extension modules effnet_fast._cpu_<name>.
static pybind11::list supported_isas() {
  pybind11::list isas;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")) {
    if (may_use_tiles()) isas.append("amx");
    isas.append("avx512");
  }
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
