// Sums of products over a block of 32 keys: the order of their additions, and which keys a row sees.
//
// Owns: this order, which is that of AMX's products of bfloat16 tiles (attention_amx.h), on every CPU. A row's numbers do
// not depend on the rows beside it, nor on where the numbers are read from. Knows nothing of scores and weights. Included by
// attention_*.h only.

#pragma once

#include "attention_args.h"
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

// What an item sees of a block of keys; "last" is one behind.
struct SeenBlock {
  // Keys that some query sees: others may not even be stored.
  int first, last;
  // Rows of queries, of one kv head, that see some of the keys.
  int first_row, last_row;
};
PHI_INLINE SeenBlock seen_block(const AttendArgs& a, const AttendItem& it, int group, int block) {
  const int position = a.start + it.first_query, first_position = block * kKeyBlock;
  const int first = first_key(a, position) - first_position, last = a.start + it.last_query - first_position;
  SeenBlock seen = {first > 0 ? first : 0, last < kKeyBlock ? last : kKeyBlock, 0,
                    (it.last_query - it.first_query) * group};
  if (first_position > position) seen.first_row = (first_position - position) * group;
  const int behind = (first_position + kKeyBlock - 1 + a.window - position) * group;
  if (a.window > 0 && behind < seen.last_row) seen.last_row = behind;
  return seen;
}

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

}  // namespace PHI_ISA
}  // namespace phi
