// A block of 32 keys and values that is read where it is stored, for a few rows: reading it is most of the work.
//
// Owns: how keys are turned, and how turned keys and stored values become numbers; brings what is read next closer
// meanwhile. The order of additions is attention_sums.h's. Included by attention_few.h only.

#pragma once

#include "attention_kv.h"
#include "attention_sums.h"

#if defined(PHI_AVX2) || defined(PHI_AVX512)

namespace phi {
namespace PHI_ISA {

// Keys and values to be read next, asked for by and by in the order in which they lie in memory, which is what a CPU's
// own prefetching expects, and into the outer cache, because a core waits for few lines of the inner one at a time.
struct LinesAhead {
  const char* keys;
  const char* values;
  int64_t row_nbytes;
  // Of a row.
  int nbytes;
  int at;
  // Null keys: nothing is.
  PHI_INLINE void ask() {
    if (keys == nullptr) return;
    __builtin_prefetch(keys + at, 0, 2);
    __builtin_prefetch(values + at, 0, 2);
    at += 64;
    if (at >= nbytes) at = 0, keys += row_nbytes, values += row_nbytes;
  }
};

// The keys of several heads that lie side by side: of each head columns of four bytes [head_dim * size / 4][32], and
// `scales` [32] (int8), behind one another. What stands for rows outside [first, last) is anything at all.
template <int Kind>
PHI_INLINE void turn_heads(const StoredBlock& block, int num_heads, float* to, float* scales) {
  constexpr int kSize = Kind == KV_BF16 ? 2 : 1, kHead = Kind == KV_BF16 ? 0 : 4;
  const int head_nbytes = kHead + kSize * block.head_dim;
  // Row j's; for rows that must not be read, the nearest that may.
  const char* row = block.rows + block.first * block.row_nbytes;
  for (int j = 0; j < kKeyBlock; j += 8) {
    const char* r[8];
    for (int i = 0; i < 8; i++, row += j + i > block.first && j + i < block.last ? block.row_nbytes : 0) r[i] = row;
    float* column = to + j;
    for (int h = 0; h < num_heads; h++) {
      int at = h * head_nbytes;
      if (Kind == KV_INT8) {
        for (int i = 0; i < 8; i++) scales[h * kKeyBlock + j + i] = stored_scale<Kind>(r[i] + at);
      }
      at += kHead;
      for (int d = 0; d < kSize * block.head_dim; d += 16, at += 16, column += 4 * kKeyBlock) {
        store_columns<Kind, false>(columns_of(r[0] + at, r[1] + at, r[2] + at, r[3] + at, r[4] + at, r[5] + at,
                                              r[6] + at, r[7] + at),
                                   _mm256_setzero_ps(), column);
      }
    }
  }
}

// Stored rows, in pieces of 16 numbers from dimension d on.
template <int Kind>
struct StoredRow {
  const char* row;
  int d;
  F16 scale;
  PHI_INLINE F16 piece(int c) const { return stored_numbers<Kind>(row, d + 16 * c, scale); }
};
template <int Kind, int Pieces>
struct StoredRows {
  static constexpr int kSize = Kind == KV_BF16 ? 2 : 1;
  const StoredBlock& block;
  int d;
  PHI_INLINE StoredRow<Kind> row(int k) const {
    const char* at = block.rows + k * block.row_nbytes;
    return {at, d, F16::set1(stored_scale<Kind>(at))};
  }
};

#if defined(PHI_AVX512)
// A number of each of as many keys as a register holds.
struct Lanes {
  static constexpr int kNum = 16;
  __m512 v;
  static PHI_INLINE Lanes zero() { return {_mm512_setzero_ps()}; }
  static PHI_INLINE Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  PHI_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  PHI_INLINE Lanes operator+(Lanes y) const { return {_mm512_add_ps(v, y.v)}; }
  PHI_INLINE void add_product(float x, Lanes y) { v = _mm512_fmadd_ps(_mm512_set1_ps(x), y.v, v); }
  // As attention_kv.h's column_number, of the keys' four bytes at `column`.
  template <int Kind, int I>
  static PHI_INLINE Lanes column_number(const float* column, Lanes scale) {
    const __m512i bytes = _mm512_loadu_si512(column);
    if (Kind == KV_BF16) {
      if (I == 0) return {_mm512_castsi512_ps(_mm512_slli_epi32(bytes, 16))};
      return {_mm512_castsi512_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    const __m512i first = I == 3 ? bytes : _mm512_slli_epi32(bytes, 24 - 8 * I);
    return {_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(first, 24)), scale.v)};
  }
};
#elif defined(PHI_AVX2)
// A number of each of as many keys as a register holds.
struct Lanes {
  static constexpr int kNum = 8;
  __m256 v;
  static PHI_INLINE Lanes zero() { return {_mm256_setzero_ps()}; }
  static PHI_INLINE Lanes load(const float* p) { return {_mm256_load_ps(p)}; }
  PHI_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  PHI_INLINE Lanes operator+(Lanes y) const { return {_mm256_add_ps(v, y.v)}; }
  PHI_INLINE void add_product(float x, Lanes y) { v = _mm256_fmadd_ps(_mm256_set1_ps(x), y.v, v); }
  // As attention_kv.h's column_number, of the keys' four bytes at `column`.
  template <int Kind, int I>
  static PHI_INLINE Lanes column_number(const float* column, Lanes scale) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(column));
    return {PHI_ISA::column_number<Kind, I>(bytes, scale.v)};
  }
};
#endif

// Keys turned but not widened, and values where they are stored: as WideBlock, and quicker for a single tile of at most
// 4 rows. head_dim is a multiple of 16.
template <int Kind>
struct NarrowBlock {
  const float* columns;
  const float* scales;
  StoredBlock values;
  LinesAhead& ahead;

  PHI_INLINE int dim() const { return values.head_dim; }

  template <int R>
  PHI_INLINE void scores(const float* queries, float* memory, F16 (&to)[R][2]) const {
    constexpr int kLanes = Lanes::kNum;
    constexpr int kGroups = (R <= 3 ? 32 : 16) / kLanes;
    const int ld = dim();
    for (int j = 0; j < kKeyBlock; j += kLanes * kGroups) {
      Lanes sums[kGroups][R], scale[kGroups];
      for (int g = 0; g < kGroups; g++) {
        scale[g] = Kind == KV_INT8 ? Lanes::load(scales + j + kLanes * g) : Lanes::zero();
        for (int r = 0; r < R; r++) sums[g][r] = Lanes::zero();
      }
      for (int d = 0; d < ld; d += kChainedDims) {
        const int last = d + kChainedDims < ld ? d + kChainedDims : ld;
        Lanes even[kGroups][R], odd[kGroups][R];
        if (Lanes::kNum == 16) {
          chains_of_scores<R, true, true, kGroups>(queries, d, last, j, scale, even, odd);
        } else {
          // Registers hold one of them.
          chains_of_scores<R, true, false, kGroups>(queries, d, last, j, scale, even, odd);
          chains_of_scores<R, false, true, kGroups>(queries, d, last, j, scale, even, odd);
        }
        for (int g = 0; g < kGroups; g++) {
          for (int r = 0; r < R; r++) sums[g][r] = sums[g][r] + (even[g][r] + odd[g][r]);
        }
      }
      for (int g = 0; g < kGroups; g++) {
        for (int r = 0; r < R; r++) sums[g][r].store(memory + r * kKeyBlock + j + kLanes * g);
      }
    }
    for (int r = 0; r < R; r++) {
      to[r][0] = F16::load(memory + r * kKeyBlock);
      to[r][1] = F16::load(memory + r * kKeyBlock + 16);
    }
  }

  template <int R>
  PHI_INLINE void weigh(const Visible<R>& v, const float* weights, const float* factor, float* acc) const {
    constexpr int kPieces = tile_pieces<R>();
    int d = 0;
    for (; d + 16 * kPieces <= dim(); d += 16 * kPieces) weigh_pieces<R, kPieces>(v, weights, factor, d, acc);
    if (kPieces > 2 && d + 32 <= dim()) {
      weigh_pieces<R, 2>(v, weights, factor, d, acc);
      d += 32;
    }
    for (; kPieces > 1 && d < dim(); d += 16) weigh_pieces<R, 1>(v, weights, factor, d, acc);
  }

  // The chains of dimensions d, d + 2, .. and d + 1, d + 3, .. (or one of them), for groups of keys from the j-th on.
  template <int R, bool Even, bool Odd, int Groups>
  PHI_INLINE void chains_of_scores(const float* queries, int d, int last, int j, const Lanes (&scale)[Groups],
                                   Lanes (&even)[Groups][R], Lanes (&odd)[Groups][R]) const {
    constexpr int kNumbers = Kind == KV_BF16 ? 2 : 4;
    const float* column = columns + j + d / kNumbers * kKeyBlock;
    for (int g = 0; g < Groups; g++) {
      for (int r = 0; r < R; r++) {
        if (Even) even[g][r] = Lanes::zero();
        if (Odd) odd[g][r] = Lanes::zero();
      }
    }
    for (; d < last; d += kNumbers, column += kKeyBlock) {
      if (Even && j == 0) {
        // So that all of a block was asked for when all heads of one are done.
        for (int i = 0; i < (Kind == KV_BF16 ? 2 : 3); i++) ahead.ask();
      }
      if (Even) add_column<R, 0, Groups>(column, scale, queries + d, dim(), even);
      if (Odd) add_column<R, 1, Groups>(column, scale, queries + d, dim(), odd);
      if (Even && Kind == KV_INT8) add_column<R, 2, Groups>(column, scale, queries + d, dim(), even);
      if (Odd && Kind == KV_INT8) add_column<R, 3, Groups>(column, scale, queries + d, dim(), odd);
    }
  }

  // sums[g][r] += query r's number I * that of each key of group g: number I of the four bytes of its column.
  template <int R, int I, int Groups>
  static PHI_INLINE void add_column(const float* column, const Lanes (&scale)[Groups], const float* queries, int ld,
                                    Lanes (&sums)[Groups][R]) {
    for (int g = 0; g < Groups; g++) {
      const Lanes numbers = Lanes::column_number<Kind, I>(column + Lanes::kNum * g, scale[g]);
      const float* x = R == 3 && g > 0 ? read_again(queries) : queries;
      for (int r = 0; r < R; r++) sums[g][r].add_product(x[r * ld + I], numbers);
    }
  }

  template <int R, int C>
  PHI_INLINE void weigh_pieces(const Visible<R>& v, const float* weights, const float* factor, int d,
                               float* acc) const {
    add_values<R, C>(v, weights, factor, StoredRows<Kind, C>{values, d}, dim(), acc + d);
  }
};

}  // namespace PHI_ISA
}  // namespace phi

#endif
