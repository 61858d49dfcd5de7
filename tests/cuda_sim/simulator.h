// The part of CUDA that the kernels use, on the host: every thread of a block is a fiber, or an OS thread if
// EFFNET_FAST_OS_THREADS is defined (for sanitizers). Blocks run one after another. Shared memory is full of NaN when a
// block starts.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)

namespace simulator {

#ifdef EFFNET_FAST_OS_THREADS
#define EFFNET_FAST_PER_THREAD thread_local
#else
#define EFFNET_FAST_PER_THREAD
#endif

struct Index {
  unsigned x;
};
extern EFFNET_FAST_PER_THREAD Index thread_index;
extern EFFNET_FAST_PER_THREAD Index block_index;
extern Index block_size;
extern float* shared_memory;

// The order in which the threads of a block run between barriers.
enum Order { kForward, kReverse, kRandom };
extern Order order;
extern long last_blocks;  // of a launch, the only ones that run

// Throws std::runtime_error unless every thread of the block arrives at this same line.
void barrier(const char* file, int line);
// Barriers on this line of this file (its name without folders) are passed as if they were not there; line 0: none.
void skip_barrier(const char* file, int line);

// Throws std::runtime_error for a launch that no GPU would accept.
void run(long blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace simulator

#define threadIdx simulator::thread_index
#define blockIdx simulator::block_index
#define blockDim simulator::block_size
#define __syncthreads() simulator::barrier(__FILE__, __LINE__)

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

#define EFFNET_FAST_SHARED(name) float* name = simulator::shared_memory
#define EFFNET_FAST_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), simulator::run(blocks, threads, shared_bytes, [=] { (kernel)(__VA_ARGS__); }))
