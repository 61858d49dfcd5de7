// What the kernels need of CUDA, so that nvcc compiles them for a GPU and g++ for the simulator of the tests.
#pragma once

#ifdef EFFNET_FAST_SIMULATED
#include "simulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EFFNET_FAST_SHARED(name)                                 \
  extern __shared__ __align__(16) float effnet_fast_shared[]; \
  float* name = effnet_fast_shared
#define EFFNET_FAST_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  kernel<<<(unsigned)(blocks), threads, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace effnet_fast {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }

// V values that lie together in memory and move in one instruction.
template <int Bytes>
struct Word;
template <>
struct Word<2> { using type = uint16_t; };
template <>
struct Word<4> { using type = uint32_t; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<16> { using type = uint4; };

template <class T, int V>
struct Packet {
  typename Word<V * sizeof(T)>::type word;

  __device__ __forceinline__ static Packet load(const T* from) { return {*reinterpret_cast<const decltype(word)*>(from)}; }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<decltype(word)*>(to) = word; }
  __device__ __forceinline__ void unpack(float (&values)[V]) const {
    T stored[V];
    memcpy(stored, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = to_float(stored[i]);
  }
  __device__ __forceinline__ static Packet pack(const float (&values)[V]) {
    T stored[V];
#pragma unroll
    for (int i = 0; i < V; ++i) stored[i] = from_float<T>(values[i]);
    Packet packet;
    memcpy(&packet.word, stored, sizeof(packet.word));
    return packet;
  }
};

// A packet from global to shared memory, zeros if not `inside`. Where the GPU can, 16 bytes travel on their own:
// `close_copies` after some, and `wait_for_copies<N>` waits for all but the last N such closed sets of this thread.
template <class T, int V>
__device__ __forceinline__ void copy_packet(T* shared, const T* from, bool inside) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (V * sizeof(T) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
    return;
  }
#endif
  (inside ? Packet<T, V>::load(from) : Packet<T, V>{}).store(shared);
}
__device__ __forceinline__ void close_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// U floats of shared memory at once; nvcc would store them one by one.
template <int U>
__device__ __forceinline__ void load_shared(const float* from, float (&values)[U]) {
  Packet<float, U>::load(from).unpack(values);
}
template <int U>
__device__ __forceinline__ void store_shared(float* to, const float (&values)[U]) {
#ifdef __CUDA_ARCH__
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  if constexpr (U == 4)
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(values[0]), "f"(values[1]), "f"(values[2]),
                 "f"(values[3])
                 : "memory");
  else if constexpr (U == 2)
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(values[0]), "f"(values[1]) : "memory");
  else
    *to = values[0];
#else
  Packet<float, U>::pack(values).store(to);
#endif
}

template <int V>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = from[i];
}

__device__ __forceinline__ float sigmoid(float u) {
#ifdef __CUDA_ARCH__
  float power, share;  // without the care for denormal numbers that __expf takes: three operations of eight
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(u * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.f + power));
  return share;
#else
  return 1.f / (1.f + __expf(-u));
#endif
}
// As exact as values of T are: the hyperbolic tangent that GPUs have is, relatively, within 2^-11.
template <class T>
__device__ __forceinline__ float sigmoid_of(float u) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * u));
    return 0.5f * t + 0.5f;
  }
#endif
  return sigmoid(u);
}
// The derivative of SiLU at u, from s = sigmoid(u) and z = u * s.
__device__ __forceinline__ float silu_slope(float s, float z) { return s + z * (1.f - s); }

// Statistics of `count` values: their mean, and the sum of their squared deviations.
struct Moments {
  float count, mean, m2;

  // Chan et al. 1983
  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const float total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

// Statistics as values arrive: sums of distances from the first one, so that a large mean does not cancel in the squares.
// That first value stays beside the moments until they are merged, for the same reason: means next to it are small.
struct ShiftedSums {
  float first = 0, sum = 0, square = 0;

  __device__ __forceinline__ void add(float value, bool is_first) {
    if (is_first) first = value;
    const float d = value - first;
    sum += d;
    square += d * d;
  }
  // of the distances from `first`
  __device__ __forceinline__ Moments moments(int count) const {
    if (count == 0) return {0, 0, 0};
    const float d = sum / count;
    return {(float)count, d, square - sum * d};
  }
};

}  // namespace effnet_fast
