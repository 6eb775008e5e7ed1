// Sixteen floats, and sixteen sums of products of small integers, for the instruction set of this translation unit.
//
// Owns: the mapping to AVX-512 (PHI_AVX512, PHI_AVX512_VNNI), AVX2 (PHI_AVX2) or plain C++. The order of
// additions is the same for all of them; plain C++ rounds twice in `fma`, so its bits differ.
// Knows nothing of networks. Included by isa_*.cpp only, inside one namespace per instruction set.

#pragma once

#ifndef PHI_ISA
#error "simd.h is included by isa_*.cpp, which name their instruction set"
#endif

#include "simd_headers.h"

namespace phi {
namespace PHI_ISA {

// Always inlined: a function of one instruction set must never be linked in the place of another.
#define PHI_INLINE inline __attribute__((always_inline))

#if defined(PHI_AVX512)

struct F16 {
  __m512 v;
  static PHI_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static PHI_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
  static PHI_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
  PHI_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};
PHI_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
PHI_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PHI_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PHI_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
PHI_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PHI_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PHI_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
PHI_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
// To the nearest integer, ties to even.
PHI_INLINE F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n in [-126, 127] (floats), x normal.
PHI_INLINE F16 scale2(F16 x, F16 n) {
  __m512i bits = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), bits))};
}
// a < b ? 0 : x
PHI_INLINE F16 zero_where_less(F16 a, F16 b, F16 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
PHI_INLINE F16 from_bf16(const uint16_t* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
namespace detail {
// The upper halves are bfloat16, rounded to nearest even.
PHI_INLINE __m512i rounded_bf16(F16 a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
}  // namespace detail
PHI_INLINE void to_bf16(F16 a, uint16_t* p) {
  const __m512i u = detail::rounded_bf16(a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16)));
}
// The nearest bfloat16, as float32.
PHI_INLINE F16 as_bf16(F16 a) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(detail::rounded_bf16(a), upper))};
}
PHI_INLINE F16 from_i8(const int8_t* p) {
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
}
PHI_INLINE F16 from_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// To the nearest integers (ties to even), which must fit.
PHI_INLINE void to_i16(F16 a, int16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
PHI_INLINE void to_i8(F16 a, int8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
namespace detail {
PHI_INLINE __m256 low(F16 a) { return _mm512_castps512_ps256(a.v); }
PHI_INLINE __m256 high(F16 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
}  // namespace detail

// A pair of int16 weights for each of 16 outputs.
struct Pairs {
  __m512i v;
};
struct Sums {
  __m512i v;
  static PHI_INLINE Sums zero() { return {_mm512_setzero_si512()}; }
};
// Four weights of each of 16 outputs, in quantize.py's order, as two pairs.
PHI_INLINE void pairs_from_i8(const int8_t* p, Pairs& first, Pairs& second) {
  const __m512i fours = _mm512_loadu_si512(p);
  first.v = _mm512_srai_epi16(_mm512_slli_epi16(fours, 8), 8);
  second.v = _mm512_srai_epi16(fours, 8);
}
// sums += weights * x, for one pair x of activations.
PHI_INLINE void add_products(Sums& sums, Pairs weights, const int16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, 4);
#if defined(PHI_AVX512_VNNI)
  sums.v = _mm512_dpwssd_epi32(sums.v, weights.v, _mm512_set1_epi32(pair));
#else
  sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(weights.v, _mm512_set1_epi32(pair)));
#endif
}
PHI_INLINE F16 to_float(Sums sums) { return {_mm512_cvtepi32_ps(sums.v)}; }
// The sum of both, rounded once: its upper and lower bits are exact apart.
PHI_INLINE F16 to_float(Sums a, Sums b) {
  const __m512i mask = _mm512_set1_epi32(255);
  const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(a.v, 8), _mm512_srai_epi32(b.v, 8));
  const __m512i low = _mm512_add_epi32(_mm512_and_si512(a.v, mask), _mm512_and_si512(b.v, mask));
  return {_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low))};
}

// Four 4-bit weights for each of 16 outputs, and their sums of products with int8 over at most 32 inputs.
struct Quads {
  __m512i v;
};
struct QuadSums {
  __m512i v;
  static PHI_INLINE QuadSums zero() { return {_mm512_setzero_si512()}; }
};
PHI_INLINE void quads_from_i4(const uint8_t* p, Quads& first, Quads& second) {
  __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
  first.v = _mm512_and_si512(both, mask);
  second.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
PHI_INLINE void add_products(QuadSums& sums, Quads weights, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
#if defined(PHI_AVX512_VNNI)
  sums.v = _mm512_dpbusd_epi32(sums.v, weights.v, _mm512_set1_epi32(four));
#else
  // 15 * 127 * 2 * 8 < 2^15.
  sums.v = _mm512_add_epi16(sums.v, _mm512_maddubs_epi16(weights.v, _mm512_set1_epi32(four)));
#endif
}
PHI_INLINE F16 to_float(QuadSums sums) {
#if defined(PHI_AVX512_VNNI)
  return {_mm512_cvtepi32_ps(sums.v)};
#else
  return {_mm512_cvtepi32_ps(_mm512_madd_epi16(sums.v, _mm512_set1_epi16(1)))};
#endif
}

// Four int8 weights of each of 16 outputs in their inputs' order, and their sums of products with int8. VNNI wants one
// side without signs: there weights are 128 more, which `begin` takes away beforehand. Others multiply magnitudes.
struct Fours {
  __m512i v;
#if !defined(PHI_AVX512_VNNI)
  __mmask64 negative;
#endif
};
struct SignedSums {
  __m512i v;
#if defined(PHI_AVX512_VNNI)
  static PHI_INLINE SignedSums begin(const int32_t* offset) { return {_mm512_set1_epi32(*offset)}; }
#else
  static PHI_INLINE SignedSums begin(const int32_t*) { return {_mm512_setzero_si512()}; }
#endif
};
PHI_INLINE Fours fours_from_i8(const int8_t* p) {
  const __m512i order = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
  const __m512i w = _mm512_shuffle_epi8(_mm512_loadu_si512(p), order);
#if defined(PHI_AVX512_VNNI)
  return {_mm512_xor_si512(w, _mm512_set1_epi8(-128))};
#else
  return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
#endif
}
PHI_INLINE void add_products(SignedSums& sums, const Fours& weights, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const __m512i all = _mm512_set1_epi32(four);
#if defined(PHI_AVX512_VNNI)
  sums.v = _mm512_dpbusd_epi32(sums.v, weights.v, all);
#else
  const __m512i turned = _mm512_mask_sub_epi8(all, weights.negative, _mm512_setzero_si512(), all);
  // 127 * 127 * 2 < 2^15.
  const __m512i pairs = _mm512_maddubs_epi16(weights.v, turned);
  sums.v = _mm512_add_epi32(sums.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
PHI_INLINE F16 to_float(SignedSums sums) { return {_mm512_cvtepi32_ps(sums.v)}; }

#elif defined(PHI_AVX2)

struct F16 {
  __m256 a, b;
  static PHI_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static PHI_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static PHI_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  PHI_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
};
PHI_INLINE F16 operator+(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PHI_INLINE F16 operator-(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PHI_INLINE F16 operator*(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PHI_INLINE F16 operator/(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PHI_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
PHI_INLINE F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PHI_INLINE F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PHI_INLINE F16 abs(F16 x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
// To the nearest integer, ties to even.
PHI_INLINE F16 round(F16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
namespace detail {
PHI_INLINE __m256 scale2(__m256 x, __m256 n) {
  __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), bits));
}
PHI_INLINE __m256 from_bf16(const uint16_t* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
PHI_INLINE __m256i rounded_bf16(__m256 a) {
  __m256i u = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
PHI_INLINE __m256 as_bf16(__m256 a) { return _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bf16(a), 16)); }
PHI_INLINE __m256 low(F16 x) { return x.a; }
PHI_INLINE __m256 high(F16 x) { return x.b; }
}  // namespace detail
// x * 2^n for whole n in [-126, 127] (floats), x normal.
PHI_INLINE F16 scale2(F16 x, F16 n) { return {detail::scale2(x.a, n.a), detail::scale2(x.b, n.b)}; }
// a < b ? 0 : x
PHI_INLINE F16 zero_where_less(F16 x, F16 y, F16 z) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ), z.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ), z.b)};
}
PHI_INLINE F16 from_bf16(const uint16_t* p) { return {detail::from_bf16(p), detail::from_bf16(p + 8)}; }
PHI_INLINE void to_bf16(F16 x, uint16_t* p) {
  __m256i packed = _mm256_packus_epi32(detail::rounded_bf16(x.a), detail::rounded_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
// The nearest bfloat16, as float32.
PHI_INLINE F16 as_bf16(F16 x) { return {detail::as_bf16(x.a), detail::as_bf16(x.b)}; }
PHI_INLINE F16 from_i8(const int8_t* p) {
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
PHI_INLINE F16 from_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
// To the nearest integers (ties to even), which must fit.
PHI_INLINE void to_i16(F16 x, int16_t* p) {
  __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
PHI_INLINE void to_i8(F16 x, int8_t* p) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// A pair of int16 weights for each of 16 outputs.
struct Pairs {
  __m256i a, b;
};
struct Sums {
  __m256i a, b;
  static PHI_INLINE Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
};
// Four weights of each of 16 outputs, in quantize.py's order, as two pairs.
PHI_INLINE void pairs_from_i8(const int8_t* p, Pairs& first, Pairs& second) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i a = _mm256_loadu_si256(q), b = _mm256_loadu_si256(q + 1);
  first = {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8)};
  second = {_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8)};
}
// sums += weights * x, for one pair x of activations.
PHI_INLINE void add_products(Sums& sums, Pairs weights, const int16_t* x) {
  int32_t pair;
  __builtin_memcpy(&pair, x, 4);
  __m256i both = _mm256_set1_epi32(pair);
  sums.a = _mm256_add_epi32(sums.a, _mm256_madd_epi16(weights.a, both));
  sums.b = _mm256_add_epi32(sums.b, _mm256_madd_epi16(weights.b, both));
}
PHI_INLINE F16 to_float(Sums sums) { return {_mm256_cvtepi32_ps(sums.a), _mm256_cvtepi32_ps(sums.b)}; }
namespace detail {
PHI_INLINE __m256 sum_to_float(__m256i a, __m256i b) {
  const __m256i mask = _mm256_set1_epi32(255);
  const __m256i high = _mm256_add_epi32(_mm256_srai_epi32(a, 8), _mm256_srai_epi32(b, 8));
  const __m256i low = _mm256_add_epi32(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(low));
}
}  // namespace detail
// The sum of both, rounded once: its upper and lower bits are exact apart.
PHI_INLINE F16 to_float(Sums x, Sums y) { return {detail::sum_to_float(x.a, y.a), detail::sum_to_float(x.b, y.b)}; }

// Four 4-bit weights for each of 16 outputs, and their sums of products with int8 over at most 32 inputs.
struct Quads {
  __m256i a, b;
};
struct QuadSums {
  __m256i a, b;
  static PHI_INLINE QuadSums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
};
PHI_INLINE void quads_from_i4(const uint8_t* p, Quads& first, Quads& second) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  __m256i a = _mm256_loadu_si256(q), b = _mm256_loadu_si256(q + 1), mask = _mm256_set1_epi8(15);
  first = {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
  second = {_mm256_and_si256(_mm256_srli_epi16(a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)};
}
PHI_INLINE void add_products(QuadSums& sums, Quads weights, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  __m256i all = _mm256_set1_epi32(four);
  // 15 * 127 * 2 * 8 < 2^15.
  sums.a = _mm256_add_epi16(sums.a, _mm256_maddubs_epi16(weights.a, all));
  sums.b = _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(weights.b, all));
}
PHI_INLINE F16 to_float(QuadSums sums) {
  __m256i one = _mm256_set1_epi16(1);
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(sums.a, one)), _mm256_cvtepi32_ps(_mm256_madd_epi16(sums.b, one))};
}

// Four int8 weights of each of 16 outputs in their inputs' order, and their sums of products with int8.
struct Fours {
  __m256i a, b, a_size, b_size;
};
struct SignedSums {
  __m256i a, b;
  static PHI_INLINE SignedSums begin(const int32_t*) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
};
PHI_INLINE Fours fours_from_i8(const int8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i order = _mm256_setr_epi32(0x03010200, 0x07050604, 0x0b090a08, 0x0f0d0e0c, 0x03010200, 0x07050604,
                                          0x0b090a08, 0x0f0d0e0c);
  const __m256i a = _mm256_shuffle_epi8(_mm256_loadu_si256(q), order);
  const __m256i b = _mm256_shuffle_epi8(_mm256_loadu_si256(q + 1), order);
  return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
}
PHI_INLINE void add_products(SignedSums& sums, const Fours& weights, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const __m256i all = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
  // 127 * 127 * 2 < 2^15.
  const __m256i a = _mm256_maddubs_epi16(weights.a_size, _mm256_sign_epi8(all, weights.a));
  const __m256i b = _mm256_maddubs_epi16(weights.b_size, _mm256_sign_epi8(all, weights.b));
  sums.a = _mm256_add_epi32(sums.a, _mm256_madd_epi16(a, one));
  sums.b = _mm256_add_epi32(sums.b, _mm256_madd_epi16(b, one));
}
PHI_INLINE F16 to_float(SignedSums sums) { return {_mm256_cvtepi32_ps(sums.a), _mm256_cvtepi32_ps(sums.b)}; }

#else
#include "simd_plain.h"
#endif

#if defined(PHI_AVX2) || defined(PHI_AVX512)
// Halves are added first, then halves of halves.
PHI_INLINE float reduce_add(F16 x) {
  __m256 eight = _mm256_add_ps(detail::low(x), detail::high(x));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
PHI_INLINE float reduce_max(F16 x) {
  __m256 eight = _mm256_max_ps(detail::low(x), detail::high(x));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

// The first n (1 to 16) numbers at p; the others are zero.
PHI_INLINE F16 load_first(const float* p, int n) {
  float all[16] = {};
  for (int i = 0; i < n; i++) all[i] = p[i];
  return F16::load(all);
}
PHI_INLINE void store_first(F16 x, float* p, int n) {
  float all[16];
  x.store(all);
  for (int i = 0; i < n; i++) p[i] = all[i];
}

// 2^x; relative error below 2e-7; 0 below 2^-126 (also for -inf); at most 2^127; NaN stays NaN.
PHI_INLINE F16 exp2(F16 x) {
  const F16 lowest = F16::set1(-126.0f);
  // min and max return their second operand for NaN.
  F16 bounded = min(F16::set1(127.0f), max(lowest, x));
  F16 whole = round(bounded);
  F16 f = bounded - whole;
  // Taylor's series of 2^f, |f| <= 0.5: the next term is below 6e-9.
  F16 y = F16::set1(1.52527338e-5f);
  y = fma(y, f, F16::set1(1.54035304e-4f));
  y = fma(y, f, F16::set1(1.33335581e-3f));
  y = fma(y, f, F16::set1(9.61812911e-3f));
  y = fma(y, f, F16::set1(5.55041087e-2f));
  y = fma(y, f, F16::set1(2.40226507e-1f));
  y = fma(y, f, F16::set1(6.93147181e-1f));
  y = fma(y, f, F16::set1(1.0f));
  return zero_where_less(x, lowest, scale2(y, whole));
}

}  // namespace PHI_ISA
}  // namespace phi
