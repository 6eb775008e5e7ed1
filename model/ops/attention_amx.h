// Sixteen rows (query x head) against a block of 32 bfloat16 keys and values, by AMX's products of tiles. Bit for bit what
// attention_tile.h computes: a product of tiles adds the products of even and of odd numbers up, each in float32 and in
// order, then both sums, then what was there.
//
// Owns: the tiles' layout in memory, and the weights of sixteen rows at once. Knows nothing of items and super blocks.
// Included by attention.h only.

#pragma once

#include "amx.h"
#include "attention_kv.h"
#include "attention_tile.h"

namespace phi {
namespace PHI_ISA {

constexpr int kMatrixRows = 16;
static_assert(kMatrixRows <= kSpareRows, "the last rows' memory");

// What rows of tiles are read from, beside TileRows.
struct MatrixRows {
  const uint16_t* queries;  // bfloat16 [rows][dim]
  uint32_t* columns;        // [dim / 2][32]: two dimensions of each key
  uint32_t* pairs;          // [16][dim]: a number of two keys' values
};

// Every tile has 16 rows of 64 bytes.
inline void load_matrix_shapes() {
  TileShapes shapes;
  for (int t = 0; t < 8; t++) shapes.set(t, kMatrixRows, 64);
  PHI_TILES_LOAD_SHAPES(shapes);
}

// Values of two keys side by side, zeros for rows that must not be read. False if some number is not finite: it would
// spoil rows that do not see it.
inline bool pair_values(const StoredBlock& block, uint32_t* to) {
  const int dim = block.head_dim;
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static constexpr uint16_t kHigh[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                     24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_load_si512(kHigh);
  __mmask32 strange = 0;
  for (int j = 0; j < kKeyBlock; j += 2, to += dim) {
    const char* row = block.rows + j * block.row_nbytes;
    const char* next = block.next + j * block.row_nbytes;
    const __mmask32 first = j >= block.first && j < block.last ? 0xffffffffu : 0;
    const __mmask32 second = j + 1 >= block.first && j + 1 < block.last ? 0xffffffffu : 0;
    for (int d = 0; d < dim; d += 32) {
      const __m512i a = _mm512_maskz_loadu_epi16(first, row + 2 * d);
      const __m512i b = _mm512_maskz_loadu_epi16(second, row + block.row_nbytes + 2 * d);
      __builtin_prefetch(next + 2 * d);
      __builtin_prefetch(next + block.row_nbytes + 2 * d);
      strange |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, exponent), exponent);
      strange |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, exponent), exponent);
      _mm512_store_si512(to + d, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + d + 16, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  return strange == 0;
}

// The greatest number of each of 16 vectors.
PHI_INLINE __m512 greatest_of_each(const __m512 (&x)[16]) {
  __m512 fours[4];
  for (int i = 0; i < 4; i++) {
    __m512 twos[2];
    for (int j = 0; j < 2; j++) {
      const __m512 a = x[4 * i + 2 * j], b = x[4 * i + 2 * j + 1];
      twos[j] = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(twos[0]), b = _mm512_castps_pd(twos[1]);
    fours[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Each 128 bits have four vectors' greatest of four.
  const auto halved = [](__m512 a, __m512 b) {
    return _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halved(halved(fours[0], fours[1]), halved(fours[2], fours[3]));
}

// The keys of a block that the row sees, as bits. The row's first head is the query's at `position`.
PHI_INLINE uint32_t visible_bits(const AttendArgs& a, int group, int position, int row, int block) {
  const int t = position + row / group, base = block * kKeyBlock;
  const int first = first_key(a, t) - base, last = t + 1 - base;
  const uint32_t before = last >= kKeyBlock ? 0xffffffffu : last <= 0 ? 0 : (1u << last) - 1;
  return first <= 0 ? before : first >= kKeyBlock ? 0 : before >> first << first;
}

// As attend_tile, for 16 rows from `row` on; there is memory for all of them even where there are fewer. dim is a
// multiple of 32. Tiles 0 to 3: sums; 4, 5: queries, weights; 6, 7: keys, values.
inline void attend_matrix(const AttendArgs& a, int group, int position, int block, int dim, const TileRows& rows,
                          const MatrixRows& matrix, int row) {
  alignas(64) float scores[kMatrixRows][kKeyBlock];
  alignas(64) uint16_t weights[kMatrixRows][kKeyBlock];
  const uint16_t* queries = matrix.queries + row * dim;
  PHI_TILE_ZERO(0);
  PHI_TILE_ZERO(1);
  for (int d = 0; d < dim; d += 32) {
    const uint32_t* columns = matrix.columns + d / 2 * kKeyBlock;
    PHI_TILE_LOAD(4, queries + d, 2 * dim);
    PHI_TILE_LOAD(6, columns, 4 * kKeyBlock);
    PHI_TILE_LOAD(7, columns + 16, 4 * kKeyBlock);
    PHI_TILE_ADD_BF16(0, 4, 6);
    PHI_TILE_ADD_BF16(1, 4, 7);
  }
  PHI_TILE_STORE(0, scores[0], 4 * kKeyBlock);
  PHI_TILE_STORE(1, scores[0] + 16, 4 * kKeyBlock);

  const int t = position + row / group, base = block * kKeyBlock;
  const int latest = position + (row + kMatrixRows - 1) / group;
  if (t + 1 < base + kKeyBlock || first_key(a, latest) > base) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    for (int r = 0; r < kMatrixRows; r++) {
      const uint32_t seen = visible_bits(a, group, position, row + r, block);
      _mm512_store_ps(scores[r], _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen), _mm512_load_ps(scores[r])));
      _mm512_store_ps(scores[r] + 16,
                      _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(seen >> 16), _mm512_load_ps(scores[r] + 16)));
    }
  }
  __m512 both[kMatrixRows];
  for (int r = 0; r < kMatrixRows; r++) {
    both[r] = _mm512_max_ps(_mm512_load_ps(scores[r]), _mm512_load_ps(scores[r] + 16));
  }
  const __m512 before = _mm512_loadu_ps(rows.most + row), here = greatest_of_each(both);
  // Not `max`, which would take NaN from either.
  const __m512 most = _mm512_mask_mov_ps(before, _mm512_cmp_ps_mask(here, before, _CMP_GT_OQ), here);
  _mm512_storeu_ps(rows.most + row, most);
  // Rows that have seen nothing yet have no greatest score to be compared with: their weights are zeros.
  const __mmask16 none = _mm512_cmp_ps_mask(most, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
  const __m512 usable = _mm512_mask_mov_ps(most, none, _mm512_setzero_ps());
  alignas(64) float greatest[16], factor[16];
  _mm512_store_ps(greatest, usable);
  const F16 factors = exp2({_mm512_sub_ps(before, usable)});
  factors.store(factor);
  for (int r = 0; r < kMatrixRows; r++) {
    const F16 least = F16::set1(greatest[r]);
    const F16 first = exp2(F16::load(scores[r]) - least), second = exp2(F16::load(scores[r] + 16) - least);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(second.v, first.v);
    __builtin_memcpy(weights[r], &rounded, sizeof(rounded));
    float* sums = rows.sums + 16 * (row + r);
    fma(F16::load(sums), F16::set1(factor[r]), first + second).store(sums);
  }

  float* acc = rows.acc + row * dim;
  if (_mm512_cmp_ps_mask(factors.v, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
    for (int r = 0; r < kMatrixRows; r++) {
      const F16 f = F16::set1(factor[r]);
      for (int d = 0; d < dim; d += 16) (F16::load(acc + r * dim + d) * f).store(acc + r * dim + d);
    }
  }
  PHI_TILE_LOAD(5, weights[0], 2 * kKeyBlock);
  for (int d = 0; d < dim; d += 32) {
    PHI_TILE_LOAD(0, acc + d, 4 * dim);
    PHI_TILE_LOAD(6, matrix.pairs + d, 4 * dim);
    PHI_TILE_ADD_BF16(0, 5, 6);
    PHI_TILE_LOAD(1, acc + d + 16, 4 * dim);
    PHI_TILE_LOAD(7, matrix.pairs + d + 16, 4 * dim);
    PHI_TILE_ADD_BF16(1, 5, 7);
    PHI_TILE_STORE(0, acc + d, 4 * dim);
    PHI_TILE_STORE(1, acc + d + 16, 4 * dim);
  }
}

}  // namespace PHI_ISA
}  // namespace phi
