// One vector of floats of the width that this file is compiled for, and how it is read from and written to
// fp32, bf16 and fp16 memory. GCC's and Clang's vector types carry the arithmetic (multiply-adds contract to FMA),
// so intrinsics stand only where a conversion has an instruction of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace effnet_fast {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec broadcast(float value) { return value - Vec{}; }

// ---- fp32 ------------------------------------------------------------------------------------------------------

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// ---- bf16: round to nearest even, NaN stays NaN ------------------------------------------------------------------

inline UInt widen(Half h) {
#if defined(__AVX512F__)
  return (UInt)_mm512_cvtepu16_epi32((__m256i)h);  // GCC 12 makes three instructions of the conversion
#else
  return __builtin_convertvector(h, UInt);
#endif
}
inline Vec from_bits(Half h, BFloat16) { return (Vec)(widen(h) << 16); }
inline Half to_bits(Vec v, BFloat16) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
  const UInt bits = (UInt)v;
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Half);
#endif
}

// ---- fp16 ------------------------------------------------------------------------------------------------------

inline Vec from_bits(Half bits, Float16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)bits);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    _Float16 h;
    std::memcpy(&h, (const char*)&bits + 2 * i, sizeof h);
    v[i] = (float)h;
  }
  return v;
#endif
}
inline Half to_bits(Vec v, Float16) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Half bits;
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = (_Float16)v[i];
    std::memcpy((char*)&bits + 2 * i, &h, sizeof h);
  }
  return bits;
#endif
}

template <class T>
inline Vec load(const T* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  return from_bits(h, T{});
}
template <class T>
inline void store(T* p, Vec v) {
  const Half h = to_bits(v, T{});
  std::memcpy(p, &h, sizeof h);
}

// v as memory of type T holds it.
template <class T>
inline Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else
    return from_bits(to_bits(v, T{}), T{});
}

// ---- the last vector of a row: channels are multiples of 8, so a 16-lane vector may be half full -----------------------

using AllLanes = std::integral_constant<int, kLanes>;
using HalfLanes = std::integral_constant<int, kLanes / 2>;

template <class T>
inline Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec v, AllLanes) {
  store(p, v);
}
#if defined(__AVX512F__)
inline Vec load(const float* p, HalfLanes) { return (Vec)_mm512_zextps256_ps512(_mm256_loadu_ps(p)); }
inline void store(float* p, Vec v, HalfLanes) { _mm256_storeu_ps(p, _mm512_castps512_ps256((__m512)v)); }
template <class T>
inline Vec load(const T* p, HalfLanes) {
  const __m256i bits = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return load((const T*)&bits);
}
template <class T>
inline void store(T* p, Vec v, HalfLanes) {
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128((__m256i)to_bits(v, T{})));
}
#endif

// Calls f with the lanes of vector v that hold channels.
template <class F>
inline void with_lanes(int64_t v, int64_t channels, F&& f) {
#if defined(__AVX512F__)
  if ((v + 1) * kLanes > channels) return f(HalfLanes{});
#endif
  f(AllLanes{});
}

// ---- prefetching -------------------------------------------------------------------------------------------------

// Activations are walked a vector of channels at a time, row after row: strides that the processor does not foresee.
// Asking for the rows of the next tile or block halves the passes over tensors that are not in cache (Zen 5, bf16, 144
// channels at 56 px, cycles a vector: pool 19 to 8, depthwise 46 to 20 and backward 87 to 43, products 58 to 34).
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_to_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_to_write(void* p) { __builtin_prefetch(p, 1); }

// ---- sigmoid and SiLU --------------------------------------------------------------------------------------------

// Minimax polynomials for 2^f: relative error 8e-5 for 16-bit storage, whose own rounding is 2e-3 (bf16) and 5e-4 (fp16);
// 2e-7 for fp32.
template <class T>
inline Vec exp2_fraction(Vec f) {
#if defined(__AVX512F__)  // on [0, 1]
  if constexpr (sizeof(T) == 2) return ((0.07802452f * f + 0.22606717f) * f + 0.6958335f) * f + 0.9999252f;
  return ((((0.0018775767f * f + 0.0089893406f) * f + 0.055826318f) * f + 0.24015361f) * f + 0.6931531f) * f + 0.99999994f;
#else  // on [-1/2, 1/2]
  if constexpr (sizeof(T) == 2) return ((0.055171285f * f + 0.24261045f) * f + 0.69326097f) * f + 0.99992812f;
  return ((((0.0013276441f * f + 0.0096755363f) * f + 0.055507135f) * f + 0.2402212f) * f + 0.69314694f) * f + 1.0000001f;
#endif
}

// 1 / (1 + exp(-u)).
template <class T>
inline Vec sigmoid(Vec u) {
  const Vec t = u * -1.44269504f;
#if defined(__AVX512F__)
  // Splitting, scaling and the reciprocal have instructions of their own: the pass `pool` takes 12.5 cycles a vector,
  // with the portable form below 26 (Zen 4, bf16). Scaling takes the floor of its exponent.
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);
  const Vec denominator = 1.f + (Vec)_mm512_scalef_ps((__m512)exp2_fraction<T>(f), (__m512)t);
  if constexpr (sizeof(T) == 2) return (Vec)_mm512_rcp14_ps((__m512)denominator);
  return 1.f / denominator;
#else
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  Vec clamped = t < 126.f ? t : broadcast(126.f);
  clamped = clamped > -126.f ? clamped : broadcast(-126.f);
  const Vec shifted = clamped + kMagic;
  const Vec p = exp2_fraction<T>(clamped - (shifted - kMagic));
  return 1.f / (1.f + (Vec)((UInt)p + ((UInt)shifted << 23)));
#endif
}

template <class T>
inline Vec silu(Vec u) {
  return u * sigmoid<T>(u);
}

// SiLU'(u), given s = sigmoid(u) and z = u * s.
inline Vec silu_slope(Vec s, Vec z) { return s + z * (1.f - s); }

}  // namespace effnet_fast
