// Some rows (query x head) against one block of 32 keys and values: scores, weights, weighted values.
//
// Owns: the order of the additions within a block, which is that of AMX's products of bfloat16 tiles (attention_amx.h),
// and what is rounded to bfloat16 for their sake: queries, and weights before they meet values. A row's numbers do not
// depend on the rows beside it, nor on which of the two sources the block is read from. Knows nothing of items and super blocks. Included by attention.h only.

#pragma once

#include "attention_args.h"
#include "attention_kv.h"
#include "simd.h"

namespace phi {
namespace PHI_ISA {

// Rows of a register tile, and pieces of 16 columns that R rows are computed for at once: as many sums as registers
// hold, and enough of them for the latency of an addition.
constexpr int kTileRows = 6;
// Dimensions whose products are summed before they are added to a score.
constexpr int kChainedDims = 32;
template <int R>
constexpr int tile_pieces() {
#if defined(PHI_AVX512)
  return R >= 4 ? 2 : 4;
#else
  return R >= 4 ? 1 : R >= 2 ? 2 : 4;
#endif
}

// The rows' memory: row r's part of a [rows][x] array is at + r * x.
struct TileRows {
  const float* queries;  // [rows][dim], times scale and log2 e, rounded to bfloat16
  float* acc;            // [rows][dim]: weighted values of the super block so far
  float* sums;           // [rows][16]: its weights, summed by their keys' position modulo 16
  float* most;           // [rows]: its greatest score
  float* weights;        // [tile's rows][32]: workspace
};

// What R rows see of a block: each row its own range of keys.
template <int R>
struct Visible {
  int first[R], last[R];
  int all_first, all_last;  // what all of them see; may be empty
  bool whole;
};

// Of rows from `row` on, counted from the first head of the query at `position`.
template <int R>
PHI_INLINE Visible<R> visible_keys(const AttendArgs& a, int group, int position, int row, int block) {
  Visible<R> v;
  v.all_first = 0, v.all_last = kKeyBlock;
  for (int r = 0; r < R; r++) {
    const int t = position + (row + r) / group, first = first_key(a, t) - block * kKeyBlock;
    v.first[r] = first > 0 ? first : 0;
    v.last[r] = t + 1 - block * kKeyBlock < kKeyBlock ? t + 1 - block * kKeyBlock : kKeyBlock;
    if (v.first[r] > v.all_first) v.all_first = v.first[r];
    if (v.last[r] < v.all_last) v.all_last = v.last[r];
  }
  v.whole = v.all_first == 0 && v.all_last == kKeyBlock;
  return v;
}

// Rows of a float32 matrix [..][ld], in pieces of 16 numbers.
struct FloatRow {
  const float* numbers;
  PHI_INLINE F16 piece(int c) const { return F16::load(numbers + 16 * c); }
};
struct FloatRows {
  const float* numbers;
  int64_t ld;
  PHI_INLINE FloatRow row(int k) const { return {numbers + k * ld}; }
};

// Stored rows, in pieces of 16 numbers from dimension d on; asks for rows of the next block meanwhile.
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
    // The first rows were asked for before, see NarrowBlock::scores.
    const char* soon = block.next + (16 + k / 2) * block.row_nbytes + d * kSize;
    if (d * kSize % 64 == 0) {
      for (int i = 0; i < 16 * Pieces * kSize; i += 64) __builtin_prefetch(soon + i);
      // Not aligned, behind a scale.
      if (Kind == KV_INT8) __builtin_prefetch(soon + 67);
    }
    return {at, d, F16::set1(stored_scale<Kind>(at))};
  }
};

// Hides where p came from: what was read through it is read again, which needs no register in the meantime.
template <class T>
PHI_INLINE T* read_again(T* p) {
  __asm__ volatile("" : "+r"(p));
  return p;
}

// chain[r][c] += a[r][k] * b[k][16 c + ..] for every second k from `first` to before `last`, in this order.
template <int R, int C, class Rows>
PHI_INLINE void add_outer(F16 (&chain)[R][C], const float* a, int64_t lda, const Rows& b, int first, int last) {
  for (int k = first; k < last; k += 2) {
    const auto row = b.row(k);
    for (int c = 0; c < C; c++) {
      const F16 y = row.piece(c);
      const float* x = c > 0 && R > 1 ? read_again(a + k) : a + k;
      for (int r = 0; r < R; r++) chain[r][c] = fma(F16::set1(x[r * lda]), y, chain[r][c]);
    }
  }
}

// The same for one row of chains.
template <int C, class Rows>
PHI_INLINE void add_row(F16 (&chain)[C], const float* a, const Rows& b, int first, int last) {
  F16 own[1][C];
  for (int c = 0; c < C; c++) own[0][c] = chain[c];
  add_outer<1, C>(own, a, 0, b, first, last);
  for (int c = 0; c < C; c++) chain[c] = own[0][c];
}

// The first number of [first, ..) that is even (odd 0) or odd (1).
PHI_INLINE int from(int first, int odd) { return first + ((first ^ odd) & 1); }

// Products of up to 32 numbers: `sums` + (even ones, added up in order + odd ones), as AMX's tiles add them.
template <int R, int C>
PHI_INLINE void add_chains(const F16 (&even)[R][C], const F16 (&odd)[R][C], F16 (&sums)[R][C]) {
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) sums[r][c] = sums[r][c] + (even[r][c] + odd[r][c]);
  }
}

// A chain of weights * values, over the keys that each row sees: those of others are not even multiplied by 0, which
// would let their NaN through.
template <int R, int C, class Rows>
PHI_INLINE void chain_of_values(const Visible<R>& v, const float* weights, const Rows& values, int odd,
                                F16 (&chain)[R][C]) {
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) chain[r][c] = F16::zero();
  }
  if (v.whole) {
    add_outer<R, C>(chain, weights, kKeyBlock, values, odd, kKeyBlock);
    return;
  }
  const bool shared = v.all_first < v.all_last;
  for (int r = 0; r < R; r++) {
    const int last = shared ? v.all_first : v.last[r];
    add_row<C>(chain[r], weights + r * kKeyBlock, values, from(v.first[r], odd), last);
  }
  if (!shared) return;
  add_outer<R, C>(chain, weights, kKeyBlock, values, from(v.all_first, odd), v.all_last);
  for (int r = 0; r < R; r++) {
    add_row<C>(chain[r], weights + r * kKeyBlock, values, from(v.all_last, odd), v.last[r]);
  }
}

// acc[r][0 .. 16 C) = acc * factor + weights * values.
template <int R, int C, class Rows>
PHI_INLINE void add_values(const Visible<R>& v, const float* weights, const float* factor, const Rows& values, int dim,
                           float* acc) {
  F16 even[R][C], odd[R][C], sums[R][C];
  chain_of_values<R, C>(v, weights, values, 0, even);
  chain_of_values<R, C>(v, weights, values, 1, odd);
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) sums[r][c] = F16::load(acc + r * dim + 16 * c) * F16::set1(factor[r]);
  }
  add_chains<R, C>(even, odd, sums);
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) sums[r][c].store(acc + r * dim + 16 * c);
  }
}

// A block that was widened: keys [dim][32], values [32][dim].
struct WideBlock {
  const float* keys;
  const float* values;
  int head_dim;

  PHI_INLINE int dim() const { return padded_dim(head_dim); }

  // to[r][..] = q k for R rows of queries [R][dim] and the block's 32 keys; the second argument has room for them.
  template <int R>
  PHI_INLINE void scores(const float* queries, float*, F16 (&to)[R][2]) const {
    constexpr int kPieces = tile_pieces<R>() < 2 ? 1 : 2;
    for (int c = 0; c < 2; c += kPieces) {
      F16 sums[R][kPieces];
      for (int r = 0; r < R; r++) {
        for (int i = 0; i < kPieces; i++) sums[r][i] = F16::zero();
      }
      for (int d = 0; d < head_dim; d += kChainedDims) {
        const int last = d + kChainedDims < head_dim ? d + kChainedDims : head_dim;
        F16 even[R][kPieces], odd[R][kPieces];
        for (int r = 0; r < R; r++) {
          for (int i = 0; i < kPieces; i++) even[r][i] = odd[r][i] = F16::zero();
        }
        const FloatRows numbers = {keys + 16 * c, kKeyBlock};
        add_outer<R, kPieces>(even, queries, dim(), numbers, d, last);
        add_outer<R, kPieces>(odd, queries, dim(), numbers, d + 1, last);
        add_chains<R, kPieces>(even, odd, sums);
      }
      for (int r = 0; r < R; r++) {
        for (int i = 0; i < kPieces; i++) to[r][c + i] = sums[r][i];
      }
    }
  }

  // As add_values, for all dimensions.
  template <int R>
  PHI_INLINE void weigh(const Visible<R>& v, const float* weights, const float* factor, float* acc) const {
    constexpr int kPieces = tile_pieces<R>();
    int d = 0;
    for (; d + 16 * kPieces <= dim(); d += 16 * kPieces) {
      add_values<R, kPieces>(v, weights, factor, FloatRows{values + d, dim()}, dim(), acc + d);
    }
    for (; kPieces > 1 && d < dim(); d += 16) {
      add_values<R, 1>(v, weights, factor, FloatRows{values + d, dim()}, dim(), acc + d);
    }
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

#if defined(PHI_AVX2) || defined(PHI_AVX512)
// The same, with keys turned but not widened, and values where they are stored: quicker for a single tile of at most 4
// rows. head_dim is a multiple of 16. Brings the next block closer meanwhile.
template <int Kind>
struct NarrowBlock {
  const float* columns;
  const float* scales;
  StoredBlock keys, values;

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
        chain_of_scores<R, 0, kGroups>(queries, d, last, j, scale, even);
        chain_of_scores<R, 1, kGroups>(queries, d, last, j, scale, odd);
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

  // The chain of dimensions d + I, d + I + 2, .. (I 0 or 1), for groups of keys from the j-th on.
  template <int R, int I, int Groups>
  PHI_INLINE void chain_of_scores(const float* queries, int d, int last, int j, const Lanes (&scale)[Groups],
                                  Lanes (&chain)[Groups][R]) const {
    constexpr int kNumbers = Kind == KV_BF16 ? 2 : 4;
    const float* column = columns + j + d / kNumbers * kKeyBlock;
    for (int g = 0; g < Groups; g++) {
      for (int r = 0; r < R; r++) chain[g][r] = Lanes::zero();
    }
    for (; d < last; d += kNumbers, column += kKeyBlock) {
      if (I == 0 && j == 0) {
        keys.fetch<Kind>(16, 16, d / kNumbers);
        values.fetch<Kind>(0, 16, d / kNumbers);
      }
      add_column<R, I, Groups>(column, scale, queries + d, dim(), chain);
      if (Kind == KV_INT8) add_column<R, I + 2, Groups>(column, scale, queries + d, dim(), chain);
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
#endif

// One block, for R rows.
template <int R, class Block>
inline __attribute__((noinline)) void attend_tile(const Visible<R>& v, const TileRows& rows, int row,
                                                  const Block& block) {
  const int dim = block.dim();
  F16 scores[R][2];
  block.template scores<R>(rows.queries + row * dim, rows.weights, scores);
  if (!v.whole) {
    for (int r = 0; r < R; r++) {
      float* all = rows.weights + r * kKeyBlock;
      scores[r][0].store(all);
      scores[r][1].store(all + 16);
      for (int j = 0; j < v.first[r]; j++) all[j] = -INFINITY;
      for (int j = v.last[r]; j < kKeyBlock; j++) all[j] = -INFINITY;
      scores[r][0] = F16::load(all);
      scores[r][1] = F16::load(all + 16);
    }
  }
  float factor[16] = {};
  for (int r = 0; r < R; r++) {
    const float before = rows.most[row + r], here = reduce_max(max(scores[r][0], scores[r][1]));
    const float most = here > before ? here : before;
    rows.most[row + r] = most;
    factor[r] = before - most;
    scores[r][0] = scores[r][0] - F16::set1(most);
    scores[r][1] = scores[r][1] - F16::set1(most);
  }
  exp2(F16::load(factor)).store(factor);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    scores[r][0] = exp2(scores[r][0]);
    scores[r][1] = exp2(scores[r][1]);
  }
  for (int r = 0; r < R; r++) {
    as_bf16(scores[r][0]).store(rows.weights + r * kKeyBlock);
    as_bf16(scores[r][1]).store(rows.weights + r * kKeyBlock + 16);
    float* sums = rows.sums + 16 * (row + r);
    fma(F16::load(sums), F16::set1(factor[r]), scores[r][0] + scores[r][1]).store(sums);
  }
  block.template weigh<R>(v, rows.weights, factor, rows.acc + row * dim);
}

}  // namespace PHI_ISA
}  // namespace phi
