// The simulated passes in torch's dispatcher, for CPU tensors, behind the very bindings of the CUDA ones.
#include "../../csrc/bindings/cuda_passes.h"
#include "simulator.h"

static int multiprocessors = 1;

namespace effnet_fast {

class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor&) {}
};

void check_device(const Tensor& t, const char* name) { STD_TORCH_CHECK(t.is_cpu(), name, ": must be on the CPU"); }
Launch launch_on(const Tensor&) { return {nullptr, 1, multiprocessors}; }
void check_launch(const char*) {}

}  // namespace effnet_fast

STABLE_TORCH_LIBRARY_IMPL(effnet_fast_simulated, CPU, m) { EFFNET_FAST_REGISTER_PASSES(m); }

extern "C" void simulate(int order, int of_multiprocessors) {
  simulator::order = (simulator::Order)order;
  multiprocessors = of_multiprocessors;
}
extern "C" void run_last_blocks(long count) { simulator::last_blocks = count; }
extern "C" void skip_barrier(const char* file, int line) { simulator::skip_barrier(file, line); }

// Whether the simulator refuses what a GPU would.
template <class F>
static int refused(int threads, const F& kernel) {
  try {
    simulator::run(1, threads, 0, kernel);
  } catch (const std::runtime_error&) {
    return 1;
  }
  return 0;
}
extern "C" int parting_threads() {
  return refused(64, [] {
    if (threadIdx.x < 32) __syncthreads();
  });
}
extern "C" int too_many_threads() {
  return refused(1025, [] {});
}
