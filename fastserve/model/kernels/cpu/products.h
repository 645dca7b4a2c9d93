// Small matrix products on float32 and, in pairs, on bfloat16, and the layouts that they want.
//
// Rules: the sum of an element runs over the depth in order, whatever rows are computed beside it.

#pragma once

#include "vectors.h"

namespace {

#ifdef __AVX512F__
INLINE void transpose(F16* rows) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      __m512d x = (__m512d)a[i + k], y = (__m512d)a[i + k + 2];
      b[i + 2 * k] = (__m512)_mm512_unpacklo_pd(x, y);
      b[i + 2 * k + 1] = (__m512)_mm512_unpackhi_pd(x, y);
    }
  for (int i = 0; i < 4; i++) {
    __m512 low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    __m512 high = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    __m512 low2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    __m512 high2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    rows[i] = (F16)_mm512_shuffle_f32x4(low, low2, 0x88);
    rows[i + 8] = (F16)_mm512_shuffle_f32x4(low, low2, 0xdd);
    rows[i + 4] = (F16)_mm512_shuffle_f32x4(high, high2, 0x88);
    rows[i + 12] = (F16)_mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}
#else
INLINE void transpose(F16* rows) {
  float a[16][16];
  std::memcpy(a, rows, sizeof a);
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) rows[k][i] = a[i][k];
}
#endif

// Products over single numbers, in float32.
template <typename T>
struct Singles {
  static constexpr int64_t PER_LANE = 1;
  static INLINE F16 load_lanes(const T* from, int64_t count) { return load_some(from, count); }
  static INLINE float load_lane(const T* from) { return to_float(*from); }
  static INLINE F16 load_columns(const T* from) { return load(from); }
  static INLINE F16 load_columns(const int8_t* from) { return load(from); }
  static INLINE void load_two(const int8_t* from, F16& first, F16& second) {
    first = load(from);
    second = load(from + 16);
  }
  static INLINE void put_in_order(F16&, F16&) {}
  static INLINE void store_columns(T* to, F16 columns) { store(to, columns); }
  static INLINE F16 multiply_add(float a, F16 b, F16 sum) { return a * b + sum; }
  static INLINE void pack_values(const T* const* rows, const int64_t* jumps, float* to,
                                 int64_t count, int64_t dim, int64_t padded) {
    for (int64_t row = 0; row < count; row++)
      for (int64_t i = 0; i < dim; i += 16) {
        __builtin_prefetch(rows[row] + jumps[row] + i, 0, 2);
        store(to + row * padded + i, load_some(rows[row] + i, dim - i));
      }
  }
  // Values [i, i + 32) of row k.
  static INLINE void load_values(const T* const* rows, const int64_t* jumps, int64_t k, int64_t i,
                                 int64_t dim, F16* columns) {
    __builtin_prefetch(rows[k] + jumps[k] + i, 0, 2);
    columns[0] = load_some(rows[k] + i, dim - i);
    columns[1] = dim - i > 16 ? load_some(rows[k] + i + 16, dim - i - 16) : F16{};
  }
  // Adds up the weights as they will be multiplied, 32 of them by lane.
  static INLINE F16 pack_weights(F16 first, F16 second, float* to, F16 total) {
    store(to, first);
    store(to + 16, second);
    return total + (first + second);
  }
  static INLINE void unpack(float*, int64_t) {}
};

#ifdef __AVX512BF16__
// The bytes of whole numbers below 128 as bfloat16.
struct Int8Bytes {
  alignas(64) uint8_t low[128], high[128];

  constexpr Int8Bytes() : low(), high() {
    for (int number = 1; number < 128; number++) {
      int exponent = 0;
      while (number >> (exponent + 1)) exponent++;
      const int bits = ((127 + exponent) << 7) + ((number << (7 - exponent)) & 127);
      low[number] = bits & 255;
      high[number] = bits >> 8;
    }
  }
};
constexpr Int8Bytes INT8_BYTES;

// Products over pairs of bfloat16 numbers that share a 32-bit lane, summed in float32.
struct Pairs {
  static constexpr int64_t PER_LANE = 2;
  static INLINE F16 load_lanes(const BFloat16* from, int64_t count) {
    if (count >= 32) return load((const float*)from);
    F16 out{};
    std::memcpy(&out, from, count * 2);
    return out;
  }
  static INLINE float load_lane(const BFloat16* from) {
    float lane;
    std::memcpy(&lane, from, 4);
    return lane;
  }
  static INLINE F16 load_columns(const BFloat16* from) { return load((const float*)from); }
  // Exact: bfloat16 has every whole number of eight bits.
  static INLINE F16 load_columns(const int8_t* from) {
    return (F16)_mm512_cvtne2ps_pbh((__m512)load(from + 16), (__m512)load(from));
  }
  static INLINE void store_columns(BFloat16* to, F16 columns) { store((float*)to, columns); }
  // Two sixteens of columns at once. They come mixed where that is faster: by looking up their
  // bytes. `put_in_order` takes what is summed of them apart.
#ifdef __AVX512VBMI__
  static INLINE void load_two(const int8_t* from, F16& first, F16& second) {
    const __m512i* bytes = (const __m512i*)&INT8_BYTES;
    __m512i numbers;
    std::memcpy(&numbers, from, 64);
    const __m512i size = _mm512_abs_epi8(numbers), sign = _mm512_set1_epi8(-128);
    const __m512i low = _mm512_permutex2var_epi8(bytes[0], size, bytes[1]);
    __m512i high = _mm512_permutex2var_epi8(bytes[2], size, bytes[3]);
    high = _mm512_or_si512(high, _mm512_and_si512(numbers, sign));
    first = (F16)_mm512_unpacklo_epi8(low, high);
    second = (F16)_mm512_unpackhi_epi8(low, high);
  }
  static INLINE void put_in_order(F16& first, F16& second) {
    const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    const __m512d a = (__m512d)first, b = (__m512d)second;
    first = (F16)_mm512_permutex2var_pd(a, low, b);
    second = (F16)_mm512_permutex2var_pd(a, high, b);
  }
#else
  static INLINE void load_two(const int8_t* from, F16& first, F16& second) {
    first = load_columns(from);
    second = load_columns(from + 32);
  }
  static INLINE void put_in_order(F16&, F16&) {}
#endif
  static INLINE F16 multiply_add(float a, F16 b, F16 sum) {
    return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat_bits(a), (__m512bh)b);
  }
  static INLINE F16 splat_bits(float a) { return (F16)_mm512_set1_ps(a); }
  // Two rows become one of pairs; within 32 columns these come in the order of `unpack`.
  static INLINE void pack_values(const BFloat16* const* rows, const int64_t* jumps, float* to,
                                 int64_t count, int64_t dim, int64_t padded) {
    for (int64_t row = 0; row < count; row += 2)
      for (int64_t i = 0; i < dim; i += 32) {
        F16 pairs[2];
        load_values(rows, jumps, row / 2, i, dim, pairs);
        store(to + row / 2 * padded + i, pairs[0]);
        store(to + row / 2 * padded + i + 16, pairs[1]);
      }
  }
  // Values [i, i + 32) of rows 2 k and 2 k + 1, in the order of `unpack`.
  static INLINE void load_values(const BFloat16* const* rows, const int64_t* jumps, int64_t k,
                                 int64_t i, int64_t dim, F16* columns) {
    const int64_t row = 2 * k;
    __builtin_prefetch(rows[row] + jumps[row] + i, 0, 2);
    __builtin_prefetch(rows[row + 1] + jumps[row + 1] + i, 0, 2);
    __m512i a = (__m512i)load_lanes(rows[row] + i, dim - i);
    __m512i b = (__m512i)load_lanes(rows[row + 1] + i, dim - i);
    columns[0] = (F16)_mm512_unpacklo_epi16(a, b);
    columns[1] = (F16)_mm512_unpackhi_epi16(a, b);
  }
  static INLINE F16 pack_weights(F16 first, F16 second, float* to, F16 total) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    store(to, (F16)both);
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    return (F16)_mm512_dpbf16_ps((__m512)total, both, ones);
  }
  static INLINE void unpack(float* sums, int64_t padded) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_or_si512(low, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < padded; i += 32) {
      const __m512 a = (__m512)load(sums + i), b = (__m512)load(sums + i + 16);
      store(sums + i, (F16)_mm512_permutex2var_ps(a, low, b));
      store(sums + i + 16, (F16)_mm512_permutex2var_ps(a, high, b));
    }
  }
};
#endif

template <typename T>
struct ProductOf {
  typedef Singles<T> Kind;
};
#ifdef __AVX512BF16__
template <>
struct ProductOf<BFloat16> {
  typedef Pairs Kind;
};
#endif

// out[r] = factors[r] * out[r] + a[r] · b for R rows and 16 * C columns; no factors: out[r] is new.
template <typename Product, int R, int C>
INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                           int64_t depth, const float* factors, float* out, int64_t out_stride) {
  F16 sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++)
      sums[r][c] = factors ? load(out + r * out_stride + 16 * c) * factors[r] : F16{};
  for (int64_t k = 0; k < depth; k++) {
    F16 columns[C];
    for (int c = 0; c < C; c++) columns[c] = load(b + k * b_stride + 16 * c);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++)
        sums[r][c] = Product::multiply_add(a[r * a_stride + k], columns[c], sums[r][c]);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * out_stride + 16 * c, sums[r][c]);
}

template <typename Product, int C>
INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             int64_t rows, int64_t depth, const float* factors, float* out,
                             int64_t out_stride) {
  constexpr int MOST = C == 2 ? 8 : 5;
  while (rows > 0) {
    const int64_t take = rows >= MOST ? MOST : rows >= 4 ? 4 : rows;
#define BLOCK(R)                                                                               \
  multiply_block<Product, R, C>(a, a_stride, b, b_stride, depth, factors, out, out_stride)
    if (take == MOST) BLOCK(MOST);
    else if (take == 4) BLOCK(4);
    else if (take == 3) BLOCK(3);
    else if (take == 2) BLOCK(2);
    else BLOCK(1);
#undef BLOCK
    rows -= take;
    a += take * a_stride;
    out += take * out_stride;
    if (factors) factors += take;
  }
}

template <typename Product>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
              int64_t depth, int64_t columns, const float* factors, float* out,
              int64_t out_stride) {
  while (columns >= 64) {
    multiply_columns<Product, 4>(a, a_stride, b, b_stride, rows, depth, factors, out, out_stride);
    columns -= 64, b += 64, out += 64;
  }
  while (columns >= 32) {
    multiply_columns<Product, 2>(a, a_stride, b, b_stride, rows, depth, factors, out, out_stride);
    columns -= 32, b += 32, out += 32;
  }
}

}  // namespace
