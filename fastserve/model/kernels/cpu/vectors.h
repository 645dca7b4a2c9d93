// Sixteen floats at a time, for any processor: loads, stores, exp2.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float F16 __attribute__((vector_size(64)));      // sixteen floats
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int8_t B16 __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
INLINE void set(float& to, float x) { to = x; }
INLINE void set(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = x != x ? 0x7fc0 : uint16_t(rounded);
}

INLINE F16 load(const float* from) {
  F16 out;
  std::memcpy(&out, from, 64);
  return out;
}
INLINE F16 load(const BFloat16* from) {
  H16 half;
  std::memcpy(&half, from, 32);
  return (F16)(__builtin_convertvector(half, U16) << 16);
}
INLINE F16 load(const int8_t* from) {
  B16 bytes;
  std::memcpy(&bytes, from, 16);
#ifdef __AVX512F__
  return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#else
  return __builtin_convertvector(bytes, F16);
#endif
}
INLINE void store(float* to, F16 x) { std::memcpy(to, &x, 64); }
INLINE H16 round_to_halves(F16 x) {
#ifdef __AVX512BF16__
  return (H16)_mm512_cvtneps_pbh((__m512)x);
#else
  U16 bits = (U16)x;
  U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  U16 is_nan = (U16)(x != x);
  return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), H16);
#endif
}
INLINE void store(BFloat16* to, F16 x) {
  const H16 half = round_to_halves(x);
  std::memcpy(to, &half, 32);
}

// Sixteen pairs of numbers that lie one after the other, apart.
INLINE void load_pairs(const float* from, F16& first, F16& second) {
#ifdef __AVX512F__
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  const __m512 a = (__m512)load(from), b = (__m512)load(from + 16);
  first = (F16)_mm512_permutex2var_ps(a, even, b);
  second = (F16)_mm512_permutex2var_ps(a, odd, b);
#else
  for (int i = 0; i < 16; i++) first[i] = from[2 * i], second[i] = from[2 * i + 1];
#endif
}
INLINE void load_pairs(const BFloat16* from, F16& first, F16& second) {
  U16 both;
  std::memcpy(&both, from, 64);
  first = (F16)(both << 16);
  second = (F16)(both & 0xffff0000);
}
INLINE void store_pairs(float* to, F16 first, F16 second) {
  for (int i = 0; i < 16; i++) to[2 * i] = first[i], to[2 * i + 1] = second[i];
}
INLINE void store_pairs(BFloat16* to, F16 first, F16 second) {
  const U16 low = __builtin_convertvector(round_to_halves(first), U16);
  const U16 high = __builtin_convertvector(round_to_halves(second), U16);
  const U16 both = low | high << 16;
  std::memcpy(to, &both, 64);
}

// The first `count` of sixteen; the others read as zero and are not written.
template <typename T>
INLINE F16 load_some(const T* from, int64_t count) {
  if (count >= 16) return load(from);
  T some[16] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load(some);
}
template <typename T>
INLINE void store_some(T* to, F16 x, int64_t count) {
  if (count >= 16) return store(to, x);
  T some[16];
  store(some, x);
  std::memcpy(to, some, count * sizeof(T));
}

INLINE F16 splat(float x) { return x - F16{}; }
INLINE F16 choose(I16 condition, F16 yes, F16 no) {
  return (F16)((condition & (I16)yes) | (~condition & (I16)no));
}
// The second where one of them is no number.
INLINE F16 larger(F16 a, F16 b) {
#ifdef __AVX512F__
  return (F16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return choose(a > b, a, b);
#endif
}

INLINE float sum(F16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);  // in the order below
#else
  float a[16];
  std::memcpy(a, &x, 64);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
#endif
}
INLINE float largest(F16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float a[16];
  std::memcpy(a, &x, 64);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
#endif
}

// 2^x; 0 below the smallest normal number, infinity where it overflows.
INLINE F16 exp2(F16 x) {
#ifdef __AVX512F__
  // As far from zero as changes nothing more, so that no infinity is subtracted from itself. What is
  // no number stays none: it is the second of two that is kept then.
  x = (F16)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);
  const F16 rounded = (F16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  F16 fraction = x - rounded;
#else
  const F16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F16 shifted = x + magic;
  F16 fraction = x - (shifted - magic);
#endif
  F16 p = splat(1.535336188319500e-4f);
  p = p * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.0f;
#ifdef __AVX512F__
  return (F16)_mm512_scalef_ps((__m512)p, (__m512)rounded);
#else
  F16 scaled = (F16)((I16)p + (((I16)shifted - (I16)magic) << 23));
  scaled = choose(x < splat(-126.0f), F16{}, scaled);
  return choose(x >= splat(128.0f), splat(INFINITY), scaled);
#endif
}

constexpr float LOG2_E = 1.44269504088896340736f;

// Calls `body(first, count)` for sixteen elements at a time, then for those that are left.
template <typename Body>
INLINE void sixteens(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) body(i, 16);
  if (i < width) body(i, width - i);
}

}  // namespace
