// What sample.h needs beyond simd.h: comparisons to bits, packing the numbers whose bit is set, and float64 sums.
//
// Owns: these for AVX-512, AVX2 and plain C++, bits equal. Knows nothing of sampling. Included by sample*.h only.

#pragma once

#include "simd.h"

namespace phi {
namespace PHI_ISA {

// `pack`: writes the elements whose bit is set in `mask`, in order, to `out`, which needs room for 16; `out` may lie
// at or below the place where they were read. The elements are floats, ids, or places `first`, `first` + 1, ...
// `Sum`: eight float64 sums; element i of sixteen goes to number i mod 8, and halves are added at the end.

#if defined(PHI_AVX512)

// a >= b, a bit for each element.
PHI_INLINE uint32_t mask_ge(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
PHI_INLINE void pack(uint32_t mask, F16 x, float* out) {
  // Not the instruction that packs to memory: Zen 4 takes 140 cycles for it.
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x.v));
}
PHI_INLINE void pack_ids(uint32_t mask, const int32_t* ids, int32_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(ids)));
}
PHI_INLINE void pack_places(uint32_t mask, int32_t first, int32_t* out) {
  __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  places = _mm512_add_epi32(places, _mm512_set1_epi32(first));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), places));
}

struct Sum {
  __m512d v;
  static PHI_INLINE Sum zero() { return {_mm512_setzero_pd()}; }
  PHI_INLINE void add(F16 x) {
    v = _mm512_add_pd(v, _mm512_cvtps_pd(detail::low(x)));
    v = _mm512_add_pd(v, _mm512_cvtps_pd(detail::high(x)));
  }
  PHI_INLINE __m256d halves() const { return _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1)); }
};

#elif defined(PHI_AVX2)

PHI_INLINE uint32_t mask_ge(F16 x, F16 y) {
  int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ));
  int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}

namespace detail {
// For each of the 256 masks: the numbers of its set bits, ascending.
struct SetBits {
  uint8_t of[256][8];
  constexpr SetBits() : of() {
    for (int mask = 0; mask < 256; mask++) {
      int n = 0;
      for (int bit = 0; bit < 8; bit++) {
        if (mask >> bit & 1) of[mask][n++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
inline constexpr SetBits kSetBits;
PHI_INLINE __m256i set_bits(uint32_t mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.of[mask])));
}
PHI_INLINE void store(__m256i x, int32_t* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x); }
}  // namespace detail

PHI_INLINE void pack(uint32_t mask, F16 x, float* out) {
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(x.a, detail::set_bits(mask & 255)));
  out += __builtin_popcount(mask & 255);
  _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(x.b, detail::set_bits(mask >> 8)));
}
PHI_INLINE void pack_ids(uint32_t mask, const int32_t* ids, int32_t* out) {
  __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
  __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + 8));
  detail::store(_mm256_permutevar8x32_epi32(low, detail::set_bits(mask & 255)), out);
  detail::store(_mm256_permutevar8x32_epi32(high, detail::set_bits(mask >> 8)), out + __builtin_popcount(mask & 255));
}
PHI_INLINE void pack_places(uint32_t mask, int32_t first, int32_t* out) {
  detail::store(_mm256_add_epi32(detail::set_bits(mask & 255), _mm256_set1_epi32(first)), out);
  out += __builtin_popcount(mask & 255);
  detail::store(_mm256_add_epi32(detail::set_bits(mask >> 8), _mm256_set1_epi32(first + 8)), out);
}

struct Sum {
  __m256d a, b;
  static PHI_INLINE Sum zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  PHI_INLINE void add(F16 x) {
    a = _mm256_add_pd(a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)));
    b = _mm256_add_pd(b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)));
    a = _mm256_add_pd(a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)));
    b = _mm256_add_pd(b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)));
  }
  PHI_INLINE __m256d halves() const { return _mm256_add_pd(a, b); }
};

#else

inline uint32_t mask_ge(F16 a, F16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return mask;
}
inline void pack(uint32_t mask, F16 x, float* out) {
  for (int i = 0; i < 16; i++) {
    if (mask >> i & 1) *out++ = x.v[i];
  }
}
inline void pack_ids(uint32_t mask, const int32_t* ids, int32_t* out) {
  for (int i = 0; i < 16; i++) {
    if (mask >> i & 1) *out++ = ids[i];
  }
}
inline void pack_places(uint32_t mask, int32_t first, int32_t* out) {
  for (int i = 0; i < 16; i++) {
    if (mask >> i & 1) *out++ = first + i;
  }
}

struct Sum {
  double v[8];
  static inline Sum zero() { return {}; }
  inline void add(F16 x) {
    for (int i = 0; i < 16; i++) v[i % 8] += static_cast<double>(x.v[i]);
  }
};
inline double reduce_add(Sum sum) {
  for (int n = 4; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) sum.v[i] += sum.v[i + n];
  }
  return sum.v[0];
}

#endif

#if defined(PHI_AVX2) || defined(PHI_AVX512)
PHI_INLINE double reduce_add(Sum sum) {
  __m256d four = sum.halves();
  __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif

}  // namespace PHI_ISA
}  // namespace phi
