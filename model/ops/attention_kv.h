// Stored keys and values: from float32 to rows, and from blocks of 32 rows to float32 in the order that the attention
// kernel reads them.
//
// Owns: the rounding of both kinds of KV cache. Knows nothing of scores. Included by attention.h only.

#pragma once

#include "attention_args.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// Rounds one token's keys (or values), [num_kv_heads][head_dim], to a stored row. int8: a head with a number that is
// not finite becomes NaN altogether; one whose numbers are all below 1e-30 becomes zero.
inline void store_kv_row(const float* numbers, int num_kv_heads, int head_dim, int kv_kind, char* row) {
  if (kv_kind == KV_BF16) {
    const int count = num_kv_heads * head_dim;
    uint16_t* to = reinterpret_cast<uint16_t*>(row);
    int i = 0;
    for (; i + 16 <= count; i += 16) to_bf16(F16::load(numbers + i), to + i);
    if (i < count) {
      uint16_t rest[16];
      to_bf16(load_first(numbers + i, count - i), rest);
      memcpy(to + i, rest, 2 * (count - i));
    }
    return;
  }
  for (int h = 0; h < num_kv_heads; h++, numbers += head_dim, row += 4 + head_dim) {
    F16 most = F16::zero(), strange = F16::zero();
    for (int i = 0; i < head_dim; i += 16) {
      const F16 x = i + 16 <= head_dim ? F16::load(numbers + i) : load_first(numbers + i, head_dim - i);
      most = max(most, abs(x));
      strange = fma(x, F16::zero(), strange);
    }
    const float absmax = reduce_max(most), nan = reduce_add(strange);
    const bool usable = nan == 0.0f && absmax >= 1e-30f;
    const float scale = nan != 0.0f ? nan : usable ? absmax / 127.0f : 0.0f;
    memcpy(row, &scale, 4);
    const F16 factor = F16::set1(usable ? 127.0f / absmax : 0.0f);
    for (int i = 0; i < head_dim; i += 16) {
      const int count = head_dim - i < 16 ? head_dim - i : 16;
      int8_t q[16] = {};
      if (usable) to_i8((count == 16 ? F16::load(numbers + i) : load_first(numbers + i, count)) * factor, q);
      memcpy(row + 4 + i, q, count);
    }
  }
}

// One kv head's numbers in 32 consecutive rows of a region.
struct StoredBlock {
  const char* rows;
  // The block that is read after this one.
  const char* next;
  int64_t row_nbytes;
  // Only rows [first, last) may be read.
  int first, last;
  int head_dim;

  // Brings lines of the next block closer. To be called for step = 0, 1, .. while something else is computed: a core
  // keeps track of some twenty lines and forgets further ones. After `rows` / 4 steps for each 16 bytes of a row, all
  // of `rows` rows from `row` on were asked for.
  template <int Kind>
  PHI_INLINE void fetch(int row, int rows, int step) const {
    if (Kind == KV_BF16) {
      __builtin_prefetch(next + (row + step % rows) * row_nbytes + step / rows * 64);
    } else {
      // Not aligned: a row touches one line more.
      const char* at = next + (row + 2 * step % rows) * row_nbytes + 2 * step / rows * 64;
      __builtin_prefetch(at);
      __builtin_prefetch(at + row_nbytes);
    }
  }
};

template <int Kind>
PHI_INLINE float stored_scale(const char* row) {
  float scale = 1.0f;
  if (Kind == KV_INT8) memcpy(&scale, row, 4);
  return scale;
}

// Sixteen numbers of a row from dimension d on, in whatever order is the cheapest; `scale` is the row's.
template <int Kind>
PHI_INLINE F16 stored_numbers(const char* row, int d, F16 scale) {
#if defined(PHI_AVX2)
  if (Kind == KV_INT8) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + 4 + d));
    const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + 12 + d));
    return F16{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))} * scale;
  }
  // Even dimensions, then odd ones.
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * d));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(_mm256_and_si256(pairs, high))};
#else
  if (Kind == KV_INT8) return from_i8(reinterpret_cast<const int8_t*>(row) + 4 + d) * scale;
  return from_bf16(reinterpret_cast<const uint16_t*>(row) + d);
#endif
}

// The same in the order of dimensions.
template <int Kind>
PHI_INLINE F16 in_order(F16 x) {
#if defined(PHI_AVX2)
  if (Kind == KV_INT8) return x;
  const __m256 low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
#else
  return x;
#endif
}

// The same for the last dimensions, beyond which nothing is read: zeros stand there.
template <int Kind>
PHI_INLINE F16 last_numbers(const char* row, int d, int head_dim, F16 scale) {
  constexpr int kSize = Kind == KV_BF16 ? 2 : 1, kHead = Kind == KV_BF16 ? 0 : 4;
  alignas(4) char rest[4 + 32] = {};
  memcpy(rest + kHead, row + kHead + kSize * d, kSize * (head_dim - d));
  return stored_numbers<Kind>(rest, 0, scale);
}

// Values [32][padded_dim]; rows outside [first, last) keep whatever stood there.
template <int Kind>
PHI_INLINE void widen_values(const StoredBlock& block, float* to) {
  constexpr int kSize = Kind == KV_BF16 ? 2 : 1;
  const int dim = padded_dim(block.head_dim), whole = block.head_dim / 16 * 16;
  for (int j = block.first; j < block.last; j++) {
    const char* row = block.rows + j * block.row_nbytes;
    const F16 scale = F16::set1(stored_scale<Kind>(row));
    for (int i = 0; i < kSize * block.head_dim; i += 64) __builtin_prefetch(block.next + j * block.row_nbytes + i);
    for (int d = 0; d < whole; d += 16) stored_numbers<Kind>(row, d, scale).store(to + j * dim + d);
    if (whole < dim) last_numbers<Kind>(row, whole, block.head_dim, scale).store(to + j * dim + whole);
  }
}

#if defined(PHI_AVX2) || defined(PHI_AVX512)

// 16 bytes of each of 8 rows, as columns: column c has the rows' c-th four bytes.
struct Columns {
  __m256i c[4];
};
PHI_INLINE __m256i two_of(const char* low, const char* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}
PHI_INLINE Columns columns_of(const char* r0, const char* r1, const char* r2, const char* r3, const char* r4,
                              const char* r5, const char* r6, const char* r7) {
  const __m256i a = two_of(r0, r4), b = two_of(r1, r5), c = two_of(r2, r6), d = two_of(r3, r7);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
  const __m256i cd = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
  return {{_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd), _mm256_unpacklo_epi64(ab2, cd2),
           _mm256_unpackhi_epi64(ab2, cd2)}};
}

// Number i of those that share a column's four bytes (two bfloat16 or four int8), as float32.
template <int Kind, int I>
PHI_INLINE __m256 column_number(__m256i column, __m256 scale) {
  if (Kind == KV_BF16) {
    if (I == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(column, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(column, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  const __m256i first = I == 3 ? column : _mm256_slli_epi32(column, 24 - 8 * I);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(first, 24)), scale);
}

// Columns as they are, or the numbers in them as float32.
template <int Kind, bool Wide>
PHI_INLINE void store_columns(const Columns& columns, __m256 scale, float* to) {
  constexpr int kNumbers = !Wide ? 1 : Kind == KV_BF16 ? 2 : 4;
  for (int c = 0; c < 4; c++, to += kNumbers * kKeyBlock) {
    if (!Wide) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), columns.c[c]);
      continue;
    }
    _mm256_store_ps(to, column_number<Kind, 0>(columns.c[c], scale));
    _mm256_store_ps(to + kKeyBlock, column_number<Kind, 1>(columns.c[c], scale));
    if (Kind == KV_BF16) continue;
    _mm256_store_ps(to + 2 * kKeyBlock, column_number<Kind, 2>(columns.c[c], scale));
    _mm256_store_ps(to + 3 * kKeyBlock, column_number<Kind, 3>(columns.c[c], scale));
  }
}

// Keys, turned: wide, float32 [padded_dim][32]; narrow, columns of four bytes [padded_dim * size / 4][32] and `scales`
// [32] (int8). All 32-byte aligned. What stands for rows outside [first, last) is anything at all.
template <int Kind, bool Wide>
PHI_INLINE void turn_keys(const StoredBlock& block, float* to, float* scales) {
  constexpr int kSize = Kind == KV_BF16 ? 2 : 1, kHead = Kind == KV_BF16 ? 0 : 4, kStep = 16 / kSize;
  constexpr int kPerNumber = Wide ? kKeyBlock : kKeyBlock * kSize / 4;
  const int whole = block.head_dim / kStep * kStep;
  // Row j's; for rows that must not be read, the nearest that may.
  const char* row = block.rows + block.first * block.row_nbytes;
  for (int j = 0; j < kKeyBlock; j += 8) {
    const char* r[8];
    for (int i = 0; i < 8; i++, row += j + i > block.first && j + i < block.last ? block.row_nbytes : 0) {
      r[i] = row;
      if (Kind == KV_INT8) scales[j + i] = stored_scale<Kind>(r[i]);
      r[i] += kHead;
    }
    const __m256 scale = Kind == KV_INT8 ? _mm256_load_ps(scales + j) : _mm256_setzero_ps();
    for (int d = 0; d < whole; d += kStep) {
      const int64_t at = kSize * d;
      block.fetch<Kind>(j / 2, 4, d / kStep);
      store_columns<Kind, Wide>(columns_of(r[0] + at, r[1] + at, r[2] + at, r[3] + at, r[4] + at, r[5] + at, r[6] + at,
                                           r[7] + at),
                                scale, to + d * kPerNumber + j);
    }
    if (whole < block.head_dim) {
      char rest[8][16] = {};
      for (int i = 0; i < 8; i++) memcpy(rest[i], r[i] + kSize * whole, kSize * (block.head_dim - whole));
      store_columns<Kind, Wide>(columns_of(rest[0], rest[1], rest[2], rest[3], rest[4], rest[5], rest[6], rest[7]),
                                scale, to + whole * kPerNumber + j);
    }
  }
}

#else

template <int Kind, bool Wide>
PHI_INLINE void turn_keys(const StoredBlock& block, float* to, float*) {
  static_assert(Wide, "columns are for vectors");
  const int dim = padded_dim(block.head_dim);
  for (int j = block.first; j < block.last; j++) {
    const char* row = block.rows + j * block.row_nbytes;
    const F16 scale = F16::set1(stored_scale<Kind>(row));
    for (int d = 0; d < dim; d += 16) {
      float numbers[16];
      (d + 16 <= block.head_dim ? stored_numbers<Kind>(row, d, scale)
                                : last_numbers<Kind>(row, d, block.head_dim, scale))
          .store(numbers);
      for (int i = 0; i < 16; i++) to[(d + i) * kKeyBlock + j] = numbers[i];
    }
  }
}

#endif

}  // namespace PHI_ISA
}  // namespace phi
